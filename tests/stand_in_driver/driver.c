/* A stand-in for libcuda.so.1: it loads nothing and runs no kernel, and writes down every call.
 * Memory is the host's, so copies and fills do what they should, at once. A graph holds nothing:
 * what is captured is done while it is captured, and a replay does nothing.
 *
 * STAND_IN_LOG       file that gets one line for each call
 * STAND_IN_KERNELS   file with a line for each kernel: its entry, then the bytes of each parameter
 * STAND_IN_VERSION   what cuDriverGetVersion gives, 13000 for CUDA 13.0
 * STAND_IN_CAPABILITY  compute capability, 89 for 8.9
 * STAND_IN_COOPERATIVE  whether blocks may wait for each other, 1 if it is not set
 * STAND_IN_OCCUPANCY  blocks that a multiprocessor has at once, 1 if it is not set
 * STAND_IN_FAULT     where it is set, the stream fails for good from the first launch on
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define INVALID_VALUE 1
#define INVALID_IMAGE 200
#define ILLEGAL_ADDRESS 700
#define NOT_FOUND 500
#define MAX_KERNELS 256
#define MAX_PARAMETERS 64

typedef struct {
  char entry[256];
  int count;
  int sizes[MAX_PARAMETERS];
} Kernel;

static Kernel kernels[MAX_KERNELS];
static int kernel_count = -1;
static void *current_context = NULL;
static int faulty = 0;

static FILE *log_file(void) {
  static FILE *file = NULL;
  if (!file) file = fopen(getenv("STAND_IN_LOG"), "a");
  return file;
}

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static void read_kernels(void) {
  char line[4096];
  FILE *file;
  if (kernel_count >= 0) return;
  kernel_count = 0;
  file = fopen(getenv("STAND_IN_KERNELS"), "r");
  while (file && kernel_count < MAX_KERNELS && fgets(line, sizeof line, file)) {
    Kernel *kernel = &kernels[kernel_count++];
    char *word = strtok(line, " \n");
    snprintf(kernel->entry, sizeof kernel->entry, "%s", word);
    for (kernel->count = 0; (word = strtok(NULL, " \n"));) kernel->sizes[kernel->count++] = atoi(word);
  }
  if (file) fclose(file);
}

static int cuInit(unsigned flags) { (void)flags; return SUCCESS; }
static int cuDriverGetVersion(int *version) { *version = number("STAND_IN_VERSION", 13000); return SUCCESS; }
static int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
static int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
static int cuDeviceGetName(char *name, int length, int device) {
  (void)device;
  snprintf(name, length, "Stand-in GPU");
  return SUCCESS;
}
static int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int capability = number("STAND_IN_CAPABILITY", 89);
  (void)device;
  switch (attribute) {
    case 13: *value = 2000000; break;   /* clock, kHz */
    case 16: *value = 2; break;         /* multiprocessors */
    case 36: *value = 10000000; break;  /* memory clock, kHz */
    case 37: *value = 64; break;        /* memory bus, bits */
    case 38: *value = 1 << 16; break;   /* L2 cache, bytes */
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 95: *value = number("STAND_IN_COOPERATIVE", 1); break;
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}
static int cuDeviceTotalMem(size_t *bytes, int device) {
  (void)device;
  *bytes = (size_t)1 << 30;
  return SUCCESS;
}
static int cuCtxGetCurrent(void **context) { *context = current_context; return SUCCESS; }
static int cuCtxSetCurrent(void *context) { current_context = context; return SUCCESS; }
static int cuCtxSynchronize(void) { return SUCCESS; }
static int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
static int cuDevicePrimaryCtxRetain(void **context, int device) {
  (void)device;
  *context = (void *)0x1000;
  return SUCCESS;
}
static int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d,
                             void *e, unsigned f) {
  (void)a; (void)b; (void)c; (void)d; (void)e; (void)f;
  if (memcmp(code, "\177ELF", 4) != 0) return INVALID_IMAGE;
  *library = (void *)0x2000;
  fprintf(log_file(), "load\n");
  return SUCCESS;
}
static int cuLibraryUnload(void *library) { (void)library; fprintf(log_file(), "unload\n"); fflush(log_file()); return SUCCESS; }
static int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  int index;
  (void)library;
  read_kernels();
  for (index = 0; index < kernel_count; index++)
    if (strcmp(kernels[index].entry, name) == 0) {
      *kernel = &kernels[index];
      return SUCCESS;
    }
  return NOT_FOUND;
}
static int cuKernelGetFunction(void **function, void *kernel) { *function = kernel; return SUCCESS; }
static int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  (void)device;
  fprintf(log_file(), "attribute %s %d %d\n", ((Kernel *)kernel)->entry, attribute, value);
  return SUCCESS;
}
static int cuMemAlloc(uint64_t *address, size_t bytes) {
  *address = (uint64_t)aligned_alloc(512, (bytes + 511) / 512 * 512);
  fprintf(log_file(), "alloc %zu\n", bytes);
  return SUCCESS;
}
static int cuMemFree(uint64_t address) {
  free((void *)address);
  fprintf(log_file(), "free\n");
  return SUCCESS;
}
static int cuMemGetInfo(size_t *available, size_t *total) {
  *available = (size_t)16 << 20;
  *total = (size_t)1 << 30;
  return SUCCESS;
}
static int cuMemsetD32(uint64_t address, unsigned value, size_t count) {
  size_t index;
  for (index = 0; index < count; index++) ((unsigned *)address)[index] = value;
  fprintf(log_file(), "memset %u %zu\n", value, count);
  return SUCCESS;
}
static int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void *stream) {
  memset((void *)address, value, count);
  fprintf(log_file(), "fill %u %zu stream %p\n", value, count, stream);
  return SUCCESS;
}
static int cuMemcpyHtoDAsync(uint64_t target, const void *source, size_t bytes, void *stream) {
  memcpy((void *)target, source, bytes);
  fprintf(log_file(), "upload %zu stream %p\n", bytes, stream);
  return SUCCESS;
}
static int cuMemcpyDtoHAsync(void *target, uint64_t source, size_t bytes, void *stream) {
  memcpy(target, (void *)source, bytes);
  fprintf(log_file(), "download %zu stream %p\n", bytes, stream);
  return SUCCESS;
}
static int cuMemcpyDtoDAsync(uint64_t target, uint64_t source, size_t bytes, void *stream) {
  memcpy((void *)target, (void *)source, bytes);
  fprintf(log_file(), "copy %zu stream %p\n", bytes, stream);
  return SUCCESS;
}
static int cuStreamCreate(void **stream, unsigned flags) {
  (void)flags;
  *stream = (void *)0x3000;
  fprintf(log_file(), "stream\n");
  return SUCCESS;
}
static int cuStreamDestroy(void *stream) {
  (void)stream;
  fprintf(log_file(), "end stream\n");
  fflush(log_file());
  return SUCCESS;
}
static int cuStreamSynchronize(void *stream) {
  (void)stream;
  return faulty ? ILLEGAL_ADDRESS : SUCCESS;
}
static int cuStreamBeginCapture(void *stream, int mode) {
  fprintf(log_file(), "capture stream %p mode %d\n", stream, mode);
  return SUCCESS;
}
static int cuStreamEndCapture(void *stream, void **graph) {
  (void)stream;
  *graph = (void *)0x4000;
  fprintf(log_file(), "captured\n");
  return SUCCESS;
}
static int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  (void)graph; (void)flags;
  *executable = (void *)0x5000;
  fprintf(log_file(), "graph\n");
  return SUCCESS;
}
static int cuGraphDestroy(void *graph) { (void)graph; return SUCCESS; }
static int cuGraphExecDestroy(void *executable) { (void)executable; fprintf(log_file(), "end graph\n"); return SUCCESS; }
static int cuGraphLaunch(void *executable, void *stream) {
  (void)executable;
  fprintf(log_file(), "replay stream %p\n", stream);
  return SUCCESS;
}
static int cuEventCreate(void **event, unsigned flags) {
  (void)flags;
  *event = (void *)0x6000;
  fprintf(log_file(), "event\n");
  return SUCCESS;
}
static int cuEventDestroy(void *event) { (void)event; fprintf(log_file(), "end event\n"); return SUCCESS; }
static int cuEventRecord(void *event, void *stream) {
  (void)event;
  fprintf(log_file(), "record stream %p\n", stream);
  return SUCCESS;
}
static int cuEventElapsedTime(float *ms, void *begin, void *end) {
  (void)begin; (void)end;
  *ms = 0.5f;
  return SUCCESS;
}
static int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads,
                                                       size_t shared) {
  *blocks = number("STAND_IN_OCCUPANCY", 1);
  fprintf(log_file(), "occupancy %s %d %zu\n", ((Kernel *)function)->entry, threads, shared);
  return SUCCESS;
}
static int launched(const char *how, void *function, unsigned gx, unsigned gy, unsigned gz,
                    unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
                    void **parameters) {
  Kernel *kernel = function;
  int index, byte;
  fprintf(log_file(), "%s %s grid %u %u %u block %u %u %u shared %u stream %p", how, kernel->entry,
          gx, gy, gz, bx, by, bz, shared, stream);
  for (index = 0; index < kernel->count; index++) {
    fputc(' ', log_file());
    for (byte = 0; byte < kernel->sizes[index]; byte++)
      fprintf(log_file(), "%02x", ((unsigned char *)parameters[index])[byte]);
  }
  fputc('\n', log_file());
  fflush(log_file());
  faulty = getenv("STAND_IN_FAULT") != NULL;
  return SUCCESS;
}
static int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void *stream, void **parameters,
                          void **extra) {
  (void)extra;
  return launched("launch", function, gx, gy, gz, bx, by, bz, shared, stream, parameters);
}
static int cuLaunchCooperativeKernel(void *function, unsigned gx, unsigned gy, unsigned gz,
                                     unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                     void *stream, void **parameters) {
  return launched("cooperative", function, gx, gy, gz, bx, by, bz, shared, stream, parameters);
}

typedef struct {
  const char *name;
  void *function;
} Symbol;

#define SYMBOL(name) {#name, (void *)name}

static const Symbol symbols[] = {
    SYMBOL(cuInit), SYMBOL(cuDriverGetVersion), SYMBOL(cuDeviceGetCount), SYMBOL(cuDeviceGet),
    SYMBOL(cuDeviceGetName), SYMBOL(cuDeviceGetAttribute), SYMBOL(cuCtxGetCurrent),
    SYMBOL(cuCtxSetCurrent), SYMBOL(cuCtxGetDevice), SYMBOL(cuCtxSynchronize), SYMBOL(cuDevicePrimaryCtxRetain),
    SYMBOL(cuLibraryLoadData), SYMBOL(cuLibraryUnload), SYMBOL(cuLibraryGetKernel),
    SYMBOL(cuKernelGetFunction), SYMBOL(cuKernelSetAttribute), SYMBOL(cuMemAlloc), SYMBOL(cuMemFree),
    SYMBOL(cuMemsetD32), SYMBOL(cuLaunchKernel), SYMBOL(cuLaunchCooperativeKernel),
    SYMBOL(cuOccupancyMaxActiveBlocksPerMultiprocessor), SYMBOL(cuDeviceTotalMem), SYMBOL(cuMemGetInfo),
    SYMBOL(cuMemsetD8Async), SYMBOL(cuMemcpyHtoDAsync), SYMBOL(cuMemcpyDtoHAsync),
    SYMBOL(cuMemcpyDtoDAsync), SYMBOL(cuStreamCreate), SYMBOL(cuStreamDestroy),
    SYMBOL(cuStreamSynchronize), SYMBOL(cuStreamBeginCapture), SYMBOL(cuStreamEndCapture),
    SYMBOL(cuGraphInstantiateWithFlags), SYMBOL(cuGraphDestroy), SYMBOL(cuGraphExecDestroy),
    SYMBOL(cuGraphLaunch), SYMBOL(cuEventCreate), SYMBOL(cuEventDestroy), SYMBOL(cuEventRecord),
    SYMBOL(cuEventElapsedTime),
};

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  size_t index;
  (void)version;
  (void)flags;
  for (index = 0; index < sizeof symbols / sizeof *symbols; index++)
    if (strcmp(symbols[index].name, name) == 0) {
      *function = symbols[index].function;
      if (status) *status = 0;
      return SUCCESS;
    }
  *function = NULL;
  if (status) *status = 1;
  return NOT_FOUND;
}
