/* Stands in for libcuda.so.1 where there is no NVIDIA driver, and for libcublasLt.so.13 where cuDNN came without it.
 *
 * Every driver call answers "no CUDA device", which is true, so torch and cuda-python in the same process see none
 * either. cuDNN looks the names up, and gives up on an engine if one is missing, before it judges a graph from the
 * device properties it was handed. It must not know anything about cuDNN, nor pretend that a kernel ran.
 */

enum { SUCCESS = 0, NO_DEVICE = 100 };

#define NO_DEVICE_FOR(name) \
    int name(void) { return NO_DEVICE; }

/* looked up by cuDNN 9.19 to 9.28 and the CUDA runtime inside it */
NO_DEVICE_FOR(cuInit)
NO_DEVICE_FOR(cuDriverGetVersion)
NO_DEVICE_FOR(cuGetProcAddress)
NO_DEVICE_FOR(cuGetProcAddress_v2)
NO_DEVICE_FOR(cuCtxGetCurrent)
NO_DEVICE_FOR(cuCtxGetDevice)
NO_DEVICE_FOR(cuCtxGetLimit)
NO_DEVICE_FOR(cuCtxPopCurrent)
NO_DEVICE_FOR(cuCtxPushCurrent)
NO_DEVICE_FOR(cuDeviceGet)
NO_DEVICE_FOR(cuDeviceGetAttribute)
NO_DEVICE_FOR(cuDeviceGetCount)
NO_DEVICE_FOR(cuDevicePrimaryCtxRelease)
NO_DEVICE_FOR(cuDevicePrimaryCtxReset)
NO_DEVICE_FOR(cuDevicePrimaryCtxRetain)
NO_DEVICE_FOR(cuFuncGetAttribute)
NO_DEVICE_FOR(cuFuncSetAttribute)
NO_DEVICE_FOR(cuKernelGetAttribute)
NO_DEVICE_FOR(cuKernelGetFunction)
NO_DEVICE_FOR(cuKernelSetAttribute)
NO_DEVICE_FOR(cuLaunchCooperativeKernel)
NO_DEVICE_FOR(cuLaunchKernel)
NO_DEVICE_FOR(cuLaunchKernelEx)
NO_DEVICE_FOR(cuLibraryGetKernel)
NO_DEVICE_FOR(cuLibraryLoadData)
NO_DEVICE_FOR(cuLibraryLoadFromFile)
NO_DEVICE_FOR(cuLibraryUnload)
NO_DEVICE_FOR(cuLinkAddData)
NO_DEVICE_FOR(cuLinkAddData_v2)
NO_DEVICE_FOR(cuLinkAddFile_v2)
NO_DEVICE_FOR(cuLinkComplete)
NO_DEVICE_FOR(cuLinkCreate)
NO_DEVICE_FOR(cuLinkCreate_v2)
NO_DEVICE_FOR(cuLinkDestroy)
NO_DEVICE_FOR(cuMemcpyDtoH_v2)
NO_DEVICE_FOR(cuModuleGetFunction)
NO_DEVICE_FOR(cuModuleGetGlobal_v2)
NO_DEVICE_FOR(cuModuleLoadData)
NO_DEVICE_FOR(cuModuleLoadDataEx)
NO_DEVICE_FOR(cuModuleLoadFatBinary)
NO_DEVICE_FOR(cuModuleUnload)
NO_DEVICE_FOR(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NO_DEVICE_FOR(cuOccupancyMaxPotentialClusterSize)
NO_DEVICE_FOR(cuStreamGetCtx)
NO_DEVICE_FOR(cuStreamGetGreenCtx)
NO_DEVICE_FOR(cuStreamSynchronize)
NO_DEVICE_FOR(cuTensorMapEncodeIm2col)
NO_DEVICE_FOR(cuTensorMapEncodeTiled)
NO_DEVICE_FOR(cuThreadExchangeStreamCaptureMode)

static int explain(const char **text) {
    *text = "no CUDA device (this libcuda.so.1 is a stand-in)";
    return SUCCESS;
}
int cuGetErrorName(int error, const char **text) { return explain(text); }
int cuGetErrorString(int error, const char **text) { return explain(text); }

/* cuDNN aborts the process if it cannot ask for the version of cuBLASLt */
unsigned long cublasLtGetVersion(void) { return 130000; }
