// Preloaded, counts what a process asks of the C library's allocator; `allocations()` is read through ctypes.
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static long count;

long allocations(void) { return __atomic_load_n(&count, __ATOMIC_RELAXED); }

static void one(void) { __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED); }

void* malloc(size_t size) {
    one();
    return __libc_malloc(size);
}
void* calloc(size_t n, size_t size) {
    one();
    return __libc_calloc(n, size);
}
void* realloc(void* memory, size_t size) {
    one();
    return __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
    one();
    return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
    one();
    return __libc_memalign(alignment, size);
}
int posix_memalign(void** out, size_t alignment, size_t size) {
    one();
    *out = __libc_memalign(alignment, size);
    return *out == NULL ? 12 : 0;
}
