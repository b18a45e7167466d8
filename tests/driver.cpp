// A CUDA driver of the few functions that `robustreg.solvers.nvrtc` calls, which runs an emulated kernel and keeps a record.

#include KERNEL_LIBRARY

#include <cstdio>
#include <cstring>

static int pushed = 0, loaded = 0;
static void* const context = (void*)0x1234;
static void* const stream = (void*)0x5678;

extern "C" {

int cuStreamGetCtx(void* of, void** found) {
  *found = context;
  return of == stream ? 0 : 400;  // CUDA_ERROR_INVALID_HANDLE
}
int cuCtxPushCurrent_v2(void* given) {
  pushed += given == context;
  return given == context ? 0 : 201;
}
int cuCtxPopCurrent_v2(void** found) {
  *found = context;
  pushed--;
  return 0;
}
int cuCtxGetDevice(int* found) {
  *found = 3;
  return pushed == 1 ? 0 : 201;  // CUDA_ERROR_INVALID_CONTEXT
}
int cuDeviceGetAttribute(int* found, int which, int device) {
  *found = which == 75 ? 9 : which == 76 ? 0 : -1;
  return device == 3 ? 0 : 101;  // CUDA_ERROR_INVALID_DEVICE
}
int cuModuleLoadData(void** found, const void* image) {
  loaded++;
  *found = (void*)0x9abc;
  return std::memcmp(image, "\x7f" "ELF", 4) == 0 && pushed == 1 ? 0 : 200;  // CUDA_ERROR_INVALID_IMAGE
}
int cuModuleGetFunction(void** found, void* module, const char* name) {
  *found = (void*)0xdef0;
  return module == (void*)0x9abc && std::strcmp(name, "solve") == 0 ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* on, void** parameters, void** extra) {
  const bool right = function == (void*)0xdef0 && gy == 1 && gz == 1 && by == 1 && bz == 1 && bx == THREADS &&
                     shared == 0 && on == stream && !extra && pushed == 1;
  if (!right) return 1;  // CUDA_ERROR_INVALID_VALUE
  void* buffers[16];
  for (int i = 0; i < 16; i++) buffers[i] = *(void**)parameters[i];
  launch(buffers, (int)gx);
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "refused";
  return 0;
}
int times_loaded() { return loaded; }
int still_pushed() { return pushed; }
}
