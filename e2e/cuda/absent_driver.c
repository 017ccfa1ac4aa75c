/* A driver library for machines without one: it has every function of the real
 * libcuda.so.1, and each says that there is no device. Programs that link against it
 * start, and can tell their user. Never part of an image, where the real one is
 * mounted by the container runtime.
 *
 * toolkit.sh writes absent_driver.inc: one FUNCTION(name) for every function that
 * cuda.h declares, but for the two below. */
#define NO_DEVICE 100
#define INVALID_VALUE 1

#define FUNCTION(name) \
    int name(void) { return NO_DEVICE; }
#include "absent_driver.inc"

int cuGetErrorName(int error, const char **name)
{
    *name = error == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : 0;
    return *name ? 0 : INVALID_VALUE;
}

int cuGetErrorString(int error, const char **text)
{
    *text = error == NO_DEVICE ? "no CUDA-capable device is detected" : 0;
    return *text ? 0 : INVALID_VALUE;
}
