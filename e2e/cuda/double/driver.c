/* Test double of the CUDA driver's library: memory, streams and events over main
 * memory, so that code which moves data and waits can run on a machine without a GPU.
 * There are no kernels: what would launch one fails with CUDA_ERROR_NOT_SUPPORTED.
 *
 * It is stricter than the driver where that finds defects. Device addresses cannot be
 * dereferenced by the host; a copy that leaves its allocation fails; a stream does its
 * work on a thread of its own, so that who does not wait reads old values.
 *
 * driver.inc, written by build.sh, has REST(name) for every other function of cuda.h. */
#define _GNU_SOURCE
#include <cuda.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "driver.h"

#define DEVICES 8
#define MEMORY (1ull << 36)
/* Set in every device address. */
#define DEVICE_BIT (1ull << 62)

/* === memory === */

struct allocation {
    struct allocation *next;
    char *bytes;
    size_t size;
};

static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static struct allocation *allocations;

void *double_host_address(CUdeviceptr address, size_t size)
{
    void *found = NULL;
    pthread_mutex_lock(&memory_lock);
    for (struct allocation *a = allocations; a && !found; a = a->next) {
        uint64_t start = (uint64_t)a->bytes | DEVICE_BIT;
        if (address >= start && address - start <= a->size && size <= a->size - (address - start))
            found = a->bytes + (address - start);
    }
    pthread_mutex_unlock(&memory_lock);
    return found;
}

static CUresult allocate(CUdeviceptr *address, size_t size)
{
    if (size == 0)
        return CUDA_ERROR_INVALID_VALUE;
    struct allocation *a = malloc(sizeof *a);
    /* What is not written yet is not a number. */
    char *bytes = malloc(size);
    if (!a || !bytes)
        return CUDA_ERROR_OUT_OF_MEMORY;
    memset(bytes, 0xff, size);
    pthread_mutex_lock(&memory_lock);
    *a = (struct allocation){ allocations, bytes, size };
    allocations = a;
    pthread_mutex_unlock(&memory_lock);
    *address = (uint64_t)bytes | DEVICE_BIT;
    return CUDA_SUCCESS;
}

static CUresult release(CUdeviceptr address)
{
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&memory_lock);
    for (struct allocation **at = &allocations; *at; at = &(*at)->next) {
        struct allocation *a = *at;
        if (((uint64_t)a->bytes | DEVICE_BIT) == address) {
            *at = a->next;
            free(a->bytes);
            free(a);
            result = CUDA_SUCCESS;
            break;
        }
    }
    pthread_mutex_unlock(&memory_lock);
    return result;
}

/* === streams === */

struct task {
    struct task *next;
    void (*run)(struct task *);
    CUdeviceptr to, from;
    void *host;
    size_t size;
    unsigned char value;
    CUhostFn function;
    CUevent event;
    uint64_t ticket;
};

struct CUstream_st {
    /* The stream opened before. */
    CUstream previous;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct task *first, **last;
    uint64_t put, done;
    bool closing;
    CUresult failure;
};

struct CUevent_st {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t recorded, done;
};

static struct CUstream_st default_stream;
static _Atomic(CUstream) newest;
static pthread_once_t default_once = PTHREAD_ONCE_INIT;
static __thread CUstream running;

/* Every later call on the stream tells the first failure. */
static void fail(CUresult result)
{
    pthread_mutex_lock(&running->lock);
    if (running->failure == CUDA_SUCCESS)
        running->failure = result;
    pthread_mutex_unlock(&running->lock);
}

static void *work(void *argument)
{
    CUstream stream = running = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (!stream->first && !stream->closing)
            pthread_cond_wait(&stream->changed, &stream->lock);
        struct task *task = stream->first;
        if (!task)
            break;
        stream->first = task->next;
        if (!stream->first)
            stream->last = &stream->first;
        pthread_mutex_unlock(&stream->lock);
        /* Late enough for who does not wait to be found out. */
        usleep(50);
        task->run(task);
        free(task);
        pthread_mutex_lock(&stream->lock);
        stream->done++;
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

static void open_stream(CUstream stream)
{
    pthread_t thread;
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    stream->last = &stream->first;
    stream->previous = newest;
    while (!atomic_compare_exchange_weak(&newest, &stream->previous, stream))
        ;
    pthread_create(&thread, NULL, work, stream);
    pthread_detach(thread);
}

static void open_default(void) { open_stream(&default_stream); }

static CUstream stream_of(CUstream stream)
{
    /* NULL and the two special handles. */
    if ((uintptr_t)stream > 2)
        return stream;
    pthread_once(&default_once, open_default);
    return &default_stream;
}

static CUresult put(CUstream stream, struct task task)
{
    struct task *copy = malloc(sizeof *copy);
    if (!copy)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *copy = task;
    stream = stream_of(stream);
    pthread_mutex_lock(&stream->lock);
    CUresult failure = stream->failure;
    *stream->last = copy;
    stream->last = &copy->next;
    stream->put++;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    return failure;
}

static CUresult wait_for(CUstream stream)
{
    stream = stream_of(stream);
    pthread_mutex_lock(&stream->lock);
    uint64_t put = stream->put;
    while (stream->done < put)
        pthread_cond_wait(&stream->changed, &stream->lock);
    CUresult failure = stream->failure;
    pthread_mutex_unlock(&stream->lock);
    return failure;
}

static void copy_in(struct task *task)
{
    void *to = double_host_address(task->to, task->size);
    if (to)
        memcpy(to, task->host, task->size);
    else
        fail(CUDA_ERROR_ILLEGAL_ADDRESS);
    free(task->host);
}

static void copy_out(struct task *task)
{
    void *from = double_host_address(task->from, task->size);
    if (from)
        memcpy(task->host, from, task->size);
    else
        fail(CUDA_ERROR_ILLEGAL_ADDRESS);
}

static void copy_within(struct task *task)
{
    void *to = double_host_address(task->to, task->size);
    void *from = double_host_address(task->from, task->size);
    if (to && from)
        memmove(to, from, task->size);
    else
        fail(CUDA_ERROR_ILLEGAL_ADDRESS);
}

static void fill(struct task *task)
{
    void *to = double_host_address(task->to, task->size);
    if (to)
        memset(to, task->value, task->size);
    else
        fail(CUDA_ERROR_ILLEGAL_ADDRESS);
}

static void free_later(struct task *task) { fail(release(task->to)); }

static void call(struct task *task) { task->function(task->host); }

static void mark(struct task *task)
{
    pthread_mutex_lock(&task->event->lock);
    if (task->event->done < task->ticket)
        task->event->done = task->ticket;
    pthread_cond_broadcast(&task->event->changed);
    pthread_mutex_unlock(&task->event->lock);
}

static void await(struct task *task)
{
    pthread_mutex_lock(&task->event->lock);
    while (task->event->done < task->ticket)
        pthread_cond_wait(&task->event->changed, &task->event->lock);
    pthread_mutex_unlock(&task->event->lock);
}

/* === the driver's functions === */

CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    *count = DEVICES;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    if (ordinal < 0 || ordinal >= DEVICES)
        return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device)
{
    (void)device;
    *bytes = MEMORY;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    (void)device;
    *value = attribute == CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = (CUcontext)(uintptr_t)(device + 1);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device)
{
    (void)device;
    return CUDA_SUCCESS;
}

static __thread CUcontext current;

CUresult cuCtxSetCurrent(CUcontext context)
{
    current = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void)
{
    CUresult result = CUDA_SUCCESS;
    for (CUstream stream = newest; stream && !result; stream = stream->previous)
        result = wait_for(stream);
    return result;
}

CUresult cuMemAlloc(CUdeviceptr *address, size_t size) { return allocate(address, size); }

CUresult cuMemAllocAsync(CUdeviceptr *address, size_t size, CUstream stream)
{
    (void)stream;
    return allocate(address, size);
}

CUresult cuMemFree(CUdeviceptr address) { return release(address); }

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream)
{
    return put(stream, (struct task){ .run = free_later, .to = address });
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream)
{
    void *copy = malloc(size ? size : 1);
    if (!copy)
        return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(copy, from, size);
    return put(stream, (struct task){ .run = copy_in, .to = to, .host = copy, .size = size });
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream)
{
    put(stream, (struct task){ .run = copy_out, .from = from, .host = to, .size = size });
    /* As for memory that is not page-locked. */
    return wait_for(stream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream)
{
    return put(stream, (struct task){ .run = copy_within, .to = to, .from = from, .size = size });
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream)
{
    return put(stream, (struct task){ .run = fill, .to = to, .value = value, .size = size });
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags)
{
    (void)flags;
    *stream = calloc(1, sizeof **stream);
    if (!*stream)
        return CUDA_ERROR_OUT_OF_MEMORY;
    open_stream(*stream);
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream)
{
    /* What is on the stream is still done; the handle's memory stays. */
    pthread_mutex_lock(&stream->lock);
    stream->closing = true;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) { return wait_for(stream); }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    (void)stream;
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data)
{
    return put(stream, (struct task){ .run = call, .function = function, .host = data });
}

CUresult cuEventCreate(CUevent *event, unsigned int flags)
{
    (void)flags;
    *event = calloc(1, sizeof **event);
    if (!*event)
        return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_init(&(*event)->lock, NULL);
    pthread_cond_init(&(*event)->changed, NULL);
    return CUDA_SUCCESS;
}

/* The memory of events stays: a stream may still have to mark them. */
CUresult cuEventDestroy(CUevent event)
{
    (void)event;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream)
{
    pthread_mutex_lock(&event->lock);
    uint64_t ticket = ++event->recorded;
    pthread_mutex_unlock(&event->lock);
    return put(stream, (struct task){ .run = mark, .event = event, .ticket = ticket });
}

CUresult cuEventQuery(CUevent event)
{
    pthread_mutex_lock(&event->lock);
    bool is_done = event->done == event->recorded;
    pthread_mutex_unlock(&event->lock);
    return is_done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent event)
{
    struct task task = { .event = event };
    pthread_mutex_lock(&event->lock);
    task.ticket = event->recorded;
    pthread_mutex_unlock(&event->lock);
    await(&task);
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags)
{
    (void)flags;
    pthread_mutex_lock(&event->lock);
    uint64_t ticket = event->recorded;
    pthread_mutex_unlock(&event->lock);
    return put(stream, (struct task){ .run = await, .event = event, .ticket = ticket });
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
    *name = error ? "CUDA_ERROR" : "CUDA_SUCCESS";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    switch (error) {
    case CUDA_SUCCESS:
        *text = "no error";
        break;
    case CUDA_ERROR_INVALID_VALUE:
        *text = "invalid argument";
        break;
    case CUDA_ERROR_ILLEGAL_ADDRESS:
        *text = "an illegal memory access was encountered";
        break;
    case CUDA_ERROR_NOT_SUPPORTED:
        *text = "the test double of the driver does not have this";
        break;
    default:
        *text = "an error of the test double of the driver";
    }
    return CUDA_SUCCESS;
}
