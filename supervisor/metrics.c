// The server: one thread around libmicrohttpd's epoll descriptor. Every answer closes its connection, and no connection
// lives longer than it may, whatever its client does.
#include "supervisor/metrics.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/clock.h"

enum {
    CONNECTIONS = 64,     // at a time; further ones wait to be accepted
    WAITING = 512,        // of those
    REQUEST_BYTES = 8192, // memory of a connection: a longer request line or header is refused
    SILENT_SECONDS = 3,   // a connection on which nothing happens
    SAMPLES = 61,         // of utilisation, one a second: the last minute
};
#define CONNECTION_SECONDS 5.0 // of a connection altogether: a client may be slow, not endless

struct connection {
    int fd; // -1: free
    double since;
};

struct work {
    double busy_s, lifetime_s;
};

struct metrics {
    pthread_t thread;
    int stop; // eventfd
    struct queue_thread *queue;
    struct MHD_Daemon *daemon;
    struct connection connections[CONNECTIONS]; // of the thread alone
    pthread_mutex_t mutex;
    // under the mutex
    struct group_numbers *groups; // (n_groups)
    size_t n_groups;
    double told_at; // monotonic seconds
    struct work samples[SAMPLES];
    size_t n_samples; // ever taken; the last one lies at (n_samples - 1) % SAMPLES
};

// ---- the numbers

// A group that left the configuration takes its seconds along: then the difference says nothing until it is past.
static double utilisation(const struct metrics *m)
{
    if (m->n_samples < 2)
        return 0;
    const struct work *last = &m->samples[(m->n_samples - 1) % SAMPLES];
    const struct work *first = &m->samples[m->n_samples > SAMPLES ? m->n_samples % SAMPLES : 0];
    const double busy = last->busy_s - first->busy_s, lifetime = last->lifetime_s - first->lifetime_s;
    return busy <= 0 || lifetime <= 0 ? 0 : busy > lifetime ? 1 : busy / lifetime;
}

void metrics_tell(struct metrics *m, const struct group_numbers *groups, size_t n)
{
    struct group_numbers *copy = calloc(n + 1, sizeof *copy);
    struct work sum = {0};
    if (copy && n)
        memcpy(copy, groups, n * sizeof *copy);
    for (size_t i = 0; i < n; i++) {
        sum.busy_s += groups[i].busy_s;
        sum.lifetime_s += groups[i].lifetime_s;
    }
    pthread_mutex_lock(&m->mutex);
    m->told_at = monotonic_seconds();
    m->samples[m->n_samples++ % SAMPLES] = sum;
    struct group_numbers *old = copy ? m->groups : NULL;
    if (copy) {
        m->groups = copy;
        m->n_groups = n;
    }
    pthread_mutex_unlock(&m->mutex);
    free(old);
}

// *groups and n->queue.pools are the caller's to free. False: out of memory.
static bool collect(struct metrics *m, struct metrics_numbers *n, struct group_numbers **groups)
{
    *n = (struct metrics_numbers){0};
    pthread_mutex_lock(&m->mutex);
    *groups = calloc(m->n_groups + 1, sizeof **groups);
    if (*groups && m->n_groups)
        memcpy(*groups, m->groups, m->n_groups * sizeof **groups);
    n->groups = *groups;
    n->n_groups = m->n_groups;
    n->utilisation = utilisation(m);
    n->loop_age_s = monotonic_seconds() - m->told_at;
    pthread_mutex_unlock(&m->mutex);
    return *groups && queue_thread_numbers(m->queue, &n->queue);
}

// ---- requests

// text is malloc and taken over; NULL: MHD_NO, which closes the connection.
static enum MHD_Result answer(struct MHD_Connection *c, unsigned status, const char *type, char *text, size_t length)
{
    struct MHD_Response *r = text ? MHD_create_response_from_buffer(length, text, MHD_RESPMEM_MUST_FREE) : NULL;
    if (!r) {
        free(text);
        return MHD_NO;
    }
    MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    MHD_add_response_header(r, MHD_HTTP_HEADER_CONNECTION, "close");
    if (status == MHD_HTTP_METHOD_NOT_ALLOWED)
        MHD_add_response_header(r, MHD_HTTP_HEADER_ALLOW, "GET");
    const enum MHD_Result queued = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return queued;
}

static enum MHD_Result answer_line(struct MHD_Connection *c, unsigned status, const char *line)
{
    return answer(c, status, "text/plain; charset=utf-8", strdup(line), strlen(line));
}

// Answers when the header is there: no body is read.
static enum MHD_Result on_request(void *arg, struct MHD_Connection *c, const char *url, const char *method,
                                  const char *version, const char *body, size_t *body_size, void **mine)
{
    (void)version, (void)body, (void)body_size, (void)mine;
    const bool metrics = strcmp(url, "/metrics") == 0, health = strcmp(url, "/healthz") == 0;
    if (!metrics && !health)
        return answer_line(c, MHD_HTTP_NOT_FOUND, "only /metrics and /healthz are here\n");
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0)
        return answer_line(c, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET\n");
    struct metrics_numbers n;
    struct group_numbers *groups = NULL;
    enum MHD_Result result = MHD_NO;
    char line[sizeof n.queue.error + 64];
    if (collect(arg, &n, &groups)) {
        size_t length = 0;
        const unsigned status = metrics_health(&n, line, sizeof line);
        char *text = metrics ? metrics_text(&n, &length) : NULL;
        result = health ? answer_line(c, status, line) : answer(c, MHD_HTTP_OK, METRICS_CONTENT_TYPE, text, length);
    }
    free(groups);
    free(n.queue.pools);
    return result;
}

// ---- connections

static void on_connection(void *arg, struct MHD_Connection *c, void **mine, enum MHD_ConnectionNotificationCode what)
{
    struct metrics *m = arg;
    (void)mine;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
    const int fd = info ? info->connect_fd : -1, wanted = what == MHD_CONNECTION_NOTIFY_STARTED ? -1 : fd;
    for (size_t i = 0; fd >= 0 && i < CONNECTIONS; i++)
        if (m->connections[i].fd == wanted) {
            m->connections[i] = (struct connection){wanted == -1 ? fd : -1, monotonic_seconds()};
            return;
        }
}

// A client that sends a byte now and then is never silent, and would hold its place for ever.
static void end_old_connections(const struct metrics *m)
{
    const double before = monotonic_seconds() - CONNECTION_SECONDS;
    for (size_t i = 0; i < CONNECTIONS; i++)
        if (m->connections[i].fd >= 0 && m->connections[i].since < before)
            shutdown(m->connections[i].fd, SHUT_RDWR); // libmicrohttpd sees its end, and closes it
}

static void *serve(void *arg)
{
    struct metrics *m = arg;
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(m->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    struct pollfd fds[] = {{.fd = m->stop, .events = POLLIN}, {.fd = info->epoll_fd, .events = POLLIN}};
    while (!fds[0].revents) {
        MHD_UNSIGNED_LONG_LONG ms = 1000;
        if (MHD_get_timeout(m->daemon, &ms) != MHD_YES || ms > 1000)
            ms = 1000;
        if (poll(fds, 2, (int)ms) < 0)
            fds[0].revents = 0; // interrupted
        end_old_connections(m);
        MHD_run(m->daemon);
    }
    return NULL;
}

// ---- start and end

// "[::1]:9464" or "127.0.0.1:9464", as the configuration has checked it.
static socklen_t parse_address(const char *listen, struct sockaddr_storage *out)
{
    char host[64];
    const char *colon = strrchr(listen, ':');
    const bool ipv6 = *listen == '[';
    const in_port_t port = htons((uint16_t)(colon ? atoi(colon + 1) : 0));
    snprintf(host, sizeof host, "%.*s", (int)(colon ? colon - listen : 0) - 2 * ipv6, listen + ipv6);
    memset(out, 0, sizeof *out);
    if (ipv6) {
        struct sockaddr_in6 *a = (struct sockaddr_in6 *)out;
        a->sin6_family = AF_INET6;
        a->sin6_port = port;
        return inet_pton(AF_INET6, host, &a->sin6_addr) == 1 ? sizeof *a : 0;
    }
    struct sockaddr_in *a = (struct sockaddr_in *)out;
    a->sin_family = AF_INET;
    a->sin_port = port;
    return inet_pton(AF_INET, host, &a->sin_addr) == 1 ? sizeof *a : 0;
}

// *fd listens; *port is the one it got.
static int open_socket(const char *text, int *fd, unsigned *port, struct err *err)
{
    struct sockaddr_storage address;
    socklen_t length = parse_address(text, &address);
    const int on = 1;
    if (length == 0)
        return err_set(err, ERR_INVALID, "[metrics] listen = %s: not address:port", text);
    *fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd < 0 || setsockopt(*fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
        bind(*fd, (struct sockaddr *)&address, length) != 0 || listen(*fd, WAITING) != 0 ||
        getsockname(*fd, (struct sockaddr *)&address, &length) != 0)
        return err_set(err, errno == EADDRINUSE ? ERR_CONFLICT : ERR_IO, "[metrics] listen = %s: %s%s", text,
                       strerror(errno),
                       errno == EADDRINUSE ? "; choose another port, or stop what listens on this one" : "");
    *port = ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                                : ((struct sockaddr_in *)&address)->sin_port);
    return 0;
}

static void free_metrics(struct metrics *m)
{
    if (m->daemon)
        MHD_stop_daemon(m->daemon); // closes the socket that it was given
    if (m->stop >= 0)
        close(m->stop);
    pthread_mutex_destroy(&m->mutex);
    free(m->groups);
    free(m);
}

int metrics_start(const char *listen, struct queue_thread *queue, const struct log *log, struct metrics **out,
                  struct err *err)
{
    int fd = -1;
    unsigned port = 0;
    struct metrics *m = calloc(1, sizeof *m);
    if (!m)
        return err_set(err, ERR_NO_MEMORY, "metrics: out of memory");
    m->queue = queue;
    m->told_at = monotonic_seconds();
    m->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&m->mutex, NULL);
    for (size_t i = 0; i < CONNECTIONS; i++)
        m->connections[i].fd = -1;
    int rc = open_socket(listen, &fd, &port, err);
    if (rc == 0)
        m->daemon =
            MHD_start_daemon(MHD_USE_EPOLL, 0, NULL, NULL, on_request, m, MHD_OPTION_LISTEN_SOCKET, fd,
                             MHD_OPTION_CONNECTION_LIMIT, (unsigned)CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT,
                             (unsigned)SILENT_SECONDS, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)REQUEST_BYTES,
                             MHD_OPTION_NOTIFY_CONNECTION, on_connection, m, MHD_OPTION_END);
    if (!m->daemon && fd >= 0)
        close(fd);
    if (rc == 0 && (!m->daemon || m->stop < 0 || pthread_create(&m->thread, NULL, serve, m) != 0))
        rc = err_set(err, ERR_NO_MEMORY, "[metrics] listen = %s: cannot start the server: %s", listen, strerror(errno));
    if (rc != 0) {
        free_metrics(m);
        return rc;
    }
    log_line(log, LOG_INFO, "metrics.ready", "listen=%s port=%u", listen, port);
    *out = m;
    return 0;
}

void metrics_stop(struct metrics *m)
{
    if (!m)
        return;
    const uint64_t one = 1;
    const ssize_t ignored = write(m->stop, &one, sizeof one); // an eventfd at zero takes a one
    (void)ignored;
    pthread_join(m->thread, NULL);
    free_metrics(m);
}
