// fuzz.h: what the fuzz targets share. Each fuzz_NAME.c takes bytes that nobody trusts through one parser; a crash, a
// leak, an undefined operation or a promise that is not kept ends it.
#ifndef DITFLEET_TESTS_FUZZ_H
#define DITFLEET_TESTS_FUZZ_H

#include <ftw.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/err.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// A promise of the code under test.
#define PROMISE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition);                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

// That rc is success, or an error that says something. Returns whether it is success.
static inline bool fuzz_good(int rc, const struct err *err)
{
    PROMISE(rc == 0 || (rc > 0 && rc < ERR_CODES && (enum err_code)rc == err->code && err->text[0]));
    return rc == 0;
}

// A folder, in memory where there is room for such, for parsers that read files; gone at the end.
static char fuzz_folder[64];

static inline int fuzz_remove_one(const char *path, const struct stat *st, int kind, struct FTW *where)
{
    (void)st, (void)kind, (void)where;
    return remove(path);
}

static inline void fuzz_remove(void)
{
    nftw(fuzz_folder, fuzz_remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static inline void fuzz_folder_make(void)
{
    if (fuzz_folder[0])
        return;
    snprintf(fuzz_folder, sizeof fuzz_folder, "%s/ditfleet-fuzz-XXXXXX",
             access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    PROMISE(mkdtemp(fuzz_folder));
    atexit(fuzz_remove);
}

// Writes a file of the folder.
static inline void fuzz_write(const char *name, const void *data, size_t size)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", fuzz_folder, name);
    FILE *f = fopen(path, "wbe");
    PROMISE(f && fwrite(data, 1, size, f) == size);
    PROMISE(fclose(f) == 0);
}

// Copies a file of the source folder, where the targets run, into the folder.
static inline void fuzz_copy(const char *from, const char *name)
{
    static char bytes[1 << 20];
    FILE *f = fopen(from, "rbe");
    PROMISE(f);
    fuzz_write(name, bytes, fread(bytes, 1, sizeof bytes, f));
    fclose(f);
}

#endif
