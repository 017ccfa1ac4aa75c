/* What the test doubles of libraries ask of the test double of the driver. */
#pragma once
#include <cuda.h>

/* The main memory behind `size` bytes at a device address, or NULL. */
void *double_host_address(CUdeviceptr address, size_t size);
