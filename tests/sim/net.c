// net.c: sockets without a system: what is sent is served at once, on the caller's stack.
#include "net.h"

#include <errno.h>
#include <hiredis/hiredis.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FIRST_FD = 1 << 20, CONNECTIONS = 64, REQUEST_MAX = 1100 };

struct connection {
    bool used, broken;
    redisReader *reader; // of requests, which have the form of replies
    struct buffer out;   // replies; read up to `taken`
    size_t taken;
};

static struct {
    const struct net *use;
    struct connection connections[CONNECTIONS];
} net;

void net_use(const struct net *use)
{
    net.use = use;
}

void net_cut(void)
{
    for (size_t i = 0; i < CONNECTIONS; i++)
        net.connections[i].broken = true;
}

static struct connection *connection_of(int fd)
{
    return fd >= FIRST_FD && fd < FIRST_FD + CONNECTIONS ? &net.connections[fd - FIRST_FD] : NULL;
}

static int fails(int why)
{
    errno = why;
    return -1;
}

// ---- one request

static void serve(struct connection *c, const redisReply *request)
{
    struct text argv[REQUEST_MAX];
    struct buffer reply = {0};
    size_t argc = request->elements < REQUEST_MAX ? request->elements : REQUEST_MAX;
    for (size_t i = 0; i < argc; i++)
        argv[i] = (struct text){request->element[i]->str, request->element[i]->len};
    bool answered = net.use->request(net.use->arg, argc, argv, &reply);
    c->broken = c->broken || !answered;
    if (!c->broken)
        buffer_add(&c->out, reply.bytes, reply.length);
    buffer_free(&reply);
}

// ---- the system's functions; the names are the linker's

int __real_socket(int domain, int type, int protocol);
int __real_connect(int fd, const struct sockaddr *address, socklen_t length);
ssize_t __real_send(int fd, const void *bytes, size_t length, int flags);
ssize_t __real_recv(int fd, void *bytes, size_t length, int flags);
int __real_poll(struct pollfd *fds, nfds_t n, int timeout);
int __real_close(int fd);
int __real_clock_gettime(clockid_t id, struct timespec *t);
int __real_nanosleep(const struct timespec *t, struct timespec *left);
ssize_t __real_getrandom(void *bytes, size_t length, unsigned flags);

int __wrap_socket(int domain, int type, int protocol)
{
    if (!net.use)
        return __real_socket(domain, type, protocol);
    for (int i = 0; i < CONNECTIONS; i++) {
        struct connection *c = &net.connections[i];
        if (c->used)
            continue;
        *c = (struct connection){.used = true, .reader = redisReaderCreate()};
        return FIRST_FD + i;
    }
    return fails(EMFILE);
}

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t length)
{
    if (!connection_of(fd))
        return __real_connect(fd, address, length);
    return net.use->reachable(net.use->arg) ? 0 : fails(ECONNREFUSED);
}

ssize_t __wrap_send(int fd, const void *bytes, size_t length, int flags)
{
    struct connection *c = connection_of(fd);
    void *request = NULL;
    if (!c)
        return __real_send(fd, bytes, length, flags);
    if (c->broken)
        return fails(EPIPE);
    redisReaderFeed(c->reader, bytes, length);
    while (redisReaderGetReply(c->reader, &request) == REDIS_OK && request) {
        serve(c, request);
        freeReplyObject(request);
        request = NULL;
    }
    return (ssize_t)length;
}

ssize_t __wrap_recv(int fd, void *bytes, size_t length, int flags)
{
    struct connection *c = connection_of(fd);
    if (!c)
        return __real_recv(fd, bytes, length, flags);
    size_t there = c->out.length - c->taken, n = there < length ? there : length;
    if (c->broken)
        return fails(ECONNRESET);
    if (n == 0)
        return fails(EAGAIN);
    memcpy(bytes, c->out.bytes + c->taken, n);
    c->taken += n;
    if (c->taken == c->out.length)
        c->taken = c->out.length = 0;
    return (ssize_t)n;
}

int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    const struct connection *c = n == 1 ? connection_of(fds->fd) : NULL;
    if (!c)
        return __real_poll(fds, n, timeout);
    bool readable = c->broken || c->out.length > c->taken;
    fds->revents = (short)(fds->events & (POLLOUT | (readable ? POLLIN : 0)));
    if (!fds->revents)
        net.use->pass(net.use->arg, timeout);
    return fds->revents != 0;
}

int __wrap_close(int fd)
{
    struct connection *c = connection_of(fd);
    if (!c)
        return __real_close(fd);
    redisReaderFree(c->reader);
    buffer_free(&c->out);
    *c = (struct connection){0};
    return 0;
}

int __wrap_clock_gettime(clockid_t id, struct timespec *t)
{
    if (!net.use || id != CLOCK_MONOTONIC)
        return __real_clock_gettime(id, t);
    int64_t us = net.use->clock_us(net.use->arg);
    *t = (struct timespec){us / 1000000, us % 1000000 * 1000};
    return 0;
}

int __wrap_nanosleep(const struct timespec *t, struct timespec *left)
{
    if (!net.use)
        return __real_nanosleep(t, left);
    net.use->pass(net.use->arg, (int)(t->tv_sec * 1000 + t->tv_nsec / 1000000));
    return 0;
}

ssize_t __wrap_getrandom(void *bytes, size_t length, unsigned flags)
{
    if (!net.use)
        return __real_getrandom(bytes, length, flags);
    for (size_t i = 0; i < length; i++)
        ((unsigned char *)bytes)[i] = (unsigned char)(net.use->random(net.use->arg) >> 32);
    return (ssize_t)length;
}
