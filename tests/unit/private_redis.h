// private_redis.h: a Redis server of one test program, on a Unix socket in its own temporary folder.
//
// The server is the binary that redis-tools ships, which acts by its name: it is started through a link. Nothing
// listens on a port unless the test asks, nothing is written to disk, and the server dies with the test program.
#ifndef DITFLEET_TESTS_PRIVATE_REDIS_H
#define DITFLEET_TESTS_PRIVATE_REDIS_H

#include <ftw.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

struct private_redis {
    pid_t pid;
    char folder[64], socket[96], url[128];
};

// The full path of a program found in PATH under one of the names; "" if none is there.
static inline void private_redis_find(char *path, size_t size)
{
    static const char *const names[] = {"redis-server", "redis-check-rdb", "redis-check-aof"};
    for (size_t i = 0; i < 3; i++) {
        char list[4096], *save = NULL;
        snprintf(list, sizeof list, "%s", getenv("PATH") ? getenv("PATH") : "/usr/bin");
        for (char *folder = strtok_r(list, ":", &save); folder; folder = strtok_r(NULL, ":", &save)) {
            snprintf(path, size, "%s/%s", folder, names[i]);
            if (access(path, X_OK) == 0)
                return;
        }
    }
    *path = 0;
}

// The socket's name is there a moment before anybody listens.
static inline bool private_redis_listens(const char *path)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    const bool listens = fd >= 0 && connect(fd, (const struct sockaddr *)&to, sizeof to) == 0;
    if (fd >= 0)
        close(fd);
    return listens;
}

// Starts the server with further arguments (NULL-terminated, at most 40) and waits until it listens. Returns 0, or -1.
static inline int private_redis_start(struct private_redis *r, const char *const *more)
{
    char binary[4200], link[128];
    private_redis_find(binary, sizeof binary);
    snprintf(r->folder, sizeof r->folder, "/tmp/ditfleet-redis-XXXXXX");
    if (!*binary || !mkdtemp(r->folder))
        return -1;
    snprintf(link, sizeof link, "%s/redis-server", r->folder);
    snprintf(r->socket, sizeof r->socket, "%s/redis.sock", r->folder);
    snprintf(r->url, sizeof r->url, "unix://%s", r->socket);
    if (symlink(binary, link) != 0)
        return -1;
    const char *argv[64] = {link, "--port", "0",       "--unixsocket", r->socket, "--save",
                            "",   "--dir",  r->folder, "--loglevel",   "warning"};
    for (int n = 11; more && *more && n < 60; n++)
        argv[n] = *more++;
    r->pid = fork();
    if (r->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (!freopen("/dev/null", "w", stdout))
            _exit(126);
        execv(link, (char *const *)argv);
        _exit(127);
    }
    for (int i = 0; i < 500; i++) {
        if (private_redis_listens(r->socket))
            return 0;
        usleep(10000);
    }
    return -1;
}

static inline int private_redis_remove(const char *path, const struct stat *status, int kind, struct FTW *walk)
{
    (void)status, (void)kind, (void)walk;
    return remove(path);
}

static inline void private_redis_stop(struct private_redis *r)
{
    if (r->pid > 0) {
        kill(r->pid, SIGKILL);
        waitpid(r->pid, NULL, 0);
    }
    if (strncmp(r->folder, "/tmp/ditfleet-redis-", 20) == 0)
        nftw(r->folder, private_redis_remove, 8, FTW_DEPTH | FTW_PHYS);
}

#endif
