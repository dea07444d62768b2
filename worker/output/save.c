#include "worker/output/save.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(struct err *e, const char *what, const char *path)
{
    int error = errno;
    if (error == ELOOP || error == ENOTDIR)
        return err_set(e, ERR_REFUSED, "%s %.300s: a component of the path is a link or not a directory", what, path);
    if (error == ENOSPC || error == EDQUOT)
        return err_set(e, ERR_NO_MEMORY, "%s %.300s: no space left on the disk", what, path);
    return err_set(e, error == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s %.300s: %s", what, path, strerror(error));
}

static int check_path(const char *path, struct err *e)
{
    for (const char *p = path; *p;) {
        size_t n = strcspn(p, "/");
        if (n == 0 || n > NAME_MAX || (n == 1 && p[0] == '.') || (n == 2 && p[0] == '.' && p[1] == '.'))
            break;
        p += n;
        if (*p == 0)
            return 0;
        p++;
    }
    return err_set(e, ERR_REFUSED, "file path %.300s: components are 1 to 255 bytes long and neither . nor ..", path);
}

// The directory that holds path's last component, opened one component at a time so that no link is followed; *base
// points at that component. A descriptor, or -1.
static int open_parent(const char *root, const char *path, bool make, const char **base, struct err *e)
{
    if (check_path(path, e))
        return -1;
    int dir = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) {
        fail(e, "open the root", root);
        return -1;
    }
    const char *p = path;
    for (const char *slash; (slash = strchr(p, '/')); p = slash + 1) {
        char name[NAME_MAX + 1];
        snprintf(name, sizeof name, "%.*s", (int)(slash - p), p);
        bool made = !make || mkdirat(dir, name, 0755) == 0 || errno == EEXIST;
        int next = made ? openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
        if (next < 0)
            fail(e, "open the directory of", path);
        close(dir);
        if (next < 0)
            return -1;
        dir = next;
    }
    *base = p;
    return dir;
}

static int write_all(int fd, const char *bytes, size_t len)
{
    while (len > 0) {
        ssize_t n = write(fd, bytes, len);
        if (n < 0 && errno != EINTR)
            return -1;
        if (n > 0) {
            bytes += n;
            len -= (size_t)n;
        }
    }
    return 0;
}

// O_PATH descriptors cannot be synced; "." below one can.
static int sync_directory(int dir)
{
    int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int result = fsync(fd);
    close(fd);
    return result;
}

static int write_and_rename(int dir, const char *base, const void *bytes, size_t len, bool durable)
{
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        return -1;
    char temporary[64];
    snprintf(temporary, sizeof temporary, ".%016" PRIx64 ".tmp", random);
    int fd = openat(dir, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0)
        return -1;
    int result = write_all(fd, bytes, len);
    if (result == 0 && durable)
        result = fsync(fd);
    int error = errno;
    if (close(fd) != 0 && result == 0) { // a network file system reports a full disk here
        result = -1;
        error = errno;
    }
    if (result == 0 && renameat(dir, temporary, dir, base) != 0) {
        result = -1;
        error = errno;
    }
    if (result != 0)
        unlinkat(dir, temporary, 0);
    errno = error;
    return result == 0 && durable ? sync_directory(dir) : result;
}

int save_file(const char *root, const char *path, const void *bytes, size_t len, bool durable, struct err *e)
{
    struct err local = {0};
    const char *base;
    int dir = open_parent(root, path, true, &base, &local);
    if (dir < 0) // while writing, a missing directory is the node's trouble, not a missing file
        return err_set(e, local.code == ERR_NOT_FOUND ? ERR_IO : local.code, "%s", local.text);
    int code = 0;
    if (write_and_rename(dir, base, bytes, len, durable) != 0)
        code =
            errno == EISDIR ? err_set(e, ERR_REFUSED, "write %.300s: it is a directory", path) : fail(e, "write", path);
    close(dir);
    return code;
}

int save_open(const char *root, const char *path, struct err *e)
{
    const char *base;
    int dir = open_parent(root, path, false, &base, e);
    if (dir < 0)
        return -1;
    int fd = openat(dir, base, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); // a FIFO must not block
    if (fd < 0)
        fail(e, "open", path);
    close(dir);
    struct stat st;
    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))) {
        err_set(e, ERR_REFUSED, "open %.300s: not a regular file", path);
        close(fd);
        return -1;
    }
    return fd;
}
