#include "ops/cli/keep.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "worker/output/save.h"

static int write_through(const char *path, const void *bytes, size_t len, struct err *err)
{
    FILE *f = fopen(path, "we");
    bool ok = f && fwrite(bytes, 1, len, f) == len;
    int why = errno;
    if (f && fclose(f) != 0 && ok)
        ok = false, why = errno;
    return ok ? 0 : err_set(err, ERR_IO, "%.300s: cannot be written (%s)", path, strerror(why));
}

int keep_file(const char *path, const void *bytes, size_t len, struct err *err)
{
    struct stat there;
    if (lstat(path, &there) == 0 && !S_ISREG(there.st_mode))
        return write_through(path, bytes, len, err);
    const char *slash = strrchr(path, '/');
    char *directory = slash ? strndup(path, slash == path ? 1 : (size_t)(slash - path)) : strdup(".");
    struct err why = {.code = ERR_NO_MEMORY, .text = "out of memory"};
    const bool kept = directory && save_file(directory, slash ? slash + 1 : path, bytes, len, false, &why) == 0;
    free(directory);
    return kept ? 0 : err_set(err, why.code, "%.300s: cannot be written (%s)", path, why.text);
}
