/* Test doubles of what candle opens with a device: handles of cuBLAS and cuRAND, and
 * nothing to be done with them. Compiled with -DCUBLAS and with -DCURAND. */
#ifdef CUBLAS
#include <cublas_v2.h>

cublasStatus_t cublasCreate(cublasHandle_t *handle)
{
    static char open;
    *handle = (cublasHandle_t)&open;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy(cublasHandle_t handle)
{
    (void)handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream)
{
    (void)handle, (void)stream;
    return CUBLAS_STATUS_SUCCESS;
}
#endif

#ifdef CURAND
#include <curand.h>

curandStatus_t curandCreateGenerator(curandGenerator_t *generator, curandRngType_t kind)
{
    static char open;
    (void)kind;
    *generator = (curandGenerator_t)&open;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandDestroyGenerator(curandGenerator_t generator)
{
    (void)generator;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetStream(curandGenerator_t generator, cudaStream_t stream)
{
    (void)generator, (void)stream;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t generator,
                                                  unsigned long long seed)
{
    (void)generator, (void)seed;
    return CURAND_STATUS_SUCCESS;
}
#endif
