// sink.c: a small HTTP server on loopback that keeps what is PUT to it: the upload host of the quickstart and, with
// --fail, the faulty upload host of the tests. One thread, one loop.
#include "proto/err.h"
#include "proto/log.h"
#include "worker/output/save.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum fault { FAULT_NONE, FAULT_STATUS, FAULT_HANG, FAULT_DROP, FAULT_SLOW };

struct options {
    const char *dir;
    uint16_t port;
    const char *port_file, *count_file;
    enum fault fault;
    unsigned status;         // of FAULT_STATUS
    uint64_t fail_count;     // the first so many PUTs fail
    const char *retry_after; // sent with failing statuses
    double delay;            // seconds, of FAULT_SLOW
    uint64_t max_bytes;
};

struct count {
    char *path;
    uint64_t puts;
    struct count *next;
};

// A request while its body arrives, and while it is suspended.
struct request {
    struct MHD_Connection *connection;
    char *body;
    size_t len, room;
    bool too_large, no_memory, suspended;
    bool judged;      // it has been counted and given its fault
    enum fault fault; // its share of --fail
    double wake;      // monotonic time; a hanging request has none
    struct request *next;
};

struct sink {
    struct options options;
    struct log log;
    struct MHD_Daemon *daemon;
    struct count *counts;
    struct request *requests;
    uint64_t puts;
};

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// ---- answers

static enum MHD_Result answer(struct MHD_Connection *connection, unsigned status, const char *text,
                              const char *retry_after)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(strlen(text), (void *)text, MHD_RESPMEM_MUST_COPY);
    if (!r)
        return MHD_NO;
    MHD_add_response_header(r, "Content-Type", "text/plain");
    if (retry_after)
        MHD_add_response_header(r, "Retry-After", retry_after);
    if (status >= 300 && status < 400)
        MHD_add_response_header(r, "Location", "/redirected");
    if (status == 405)
        MHD_add_response_header(r, "Allow", "GET, HEAD, PUT");
    enum MHD_Result result = MHD_queue_response(connection, status, r);
    MHD_destroy_response(r);
    return result;
}

static enum MHD_Result answer_error(struct MHD_Connection *connection, const struct err *e)
{
    unsigned status = e->code == ERR_REFUSED     ? 403
                      : e->code == ERR_NOT_FOUND ? 404
                      : e->code == ERR_NO_MEMORY ? 507
                                                 : 500;
    char text[sizeof e->text + 2];
    snprintf(text, sizeof text, "%s\n", e->text);
    return answer(connection, status, text, NULL);
}

static enum MHD_Result answer_get(struct sink *s, struct MHD_Connection *connection, const char *path)
{
    struct err e;
    struct stat st;
    int fd = save_open(s->options.dir, path, &e);
    if (fd < 0)
        return answer_error(connection, &e);
    if (fstat(fd, &st) != 0) {
        close(fd);
        return MHD_NO;
    }
    struct MHD_Response *r = MHD_create_response_from_fd64((uint64_t)st.st_size, fd); // owns fd from here
    if (!r) {
        close(fd);
        return MHD_NO;
    }
    size_t n = strlen(path);
    MHD_add_response_header(r, "Content-Type",
                            n > 4 && strcmp(path + n - 4, ".png") == 0 ? "image/png" : "application/octet-stream");
    enum MHD_Result result = MHD_queue_response(connection, 200, r);
    MHD_destroy_response(r);
    return result;
}

// ---- PUT

// A small file for others to read, never half written.
static int write_whole(const struct sink *s, const char *path, const char *text, size_t len)
{
    struct err e;
    const char *slash = strrchr(path, '/');
    char dir[4096] = ".";
    if (slash)
        snprintf(dir, sizeof dir, "%.*s", (int)(slash - path) + 1, path);
    int code = save_file(dir, slash ? slash + 1 : path, text, len, false, &e);
    if (code)
        log_line(&s->log, LOG_ERROR, "sink.write", "error=\"%s\"", e.text);
    return code;
}

// "COUNT PATH" a line, rewritten whole at every PUT, failed ones included.
static void write_counts(const struct sink *s)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    if (!f)
        return;
    for (const struct count *c = s->counts; c; c = c->next)
        fprintf(f, "%" PRIu64 " %s\n", c->puts, c->path);
    if (fclose(f) == 0)
        write_whole(s, s->options.count_file, text, len);
    free(text);
}

static void count_put(struct sink *s, const char *path)
{
    struct count *c = s->counts;
    s->puts++;
    while (c && strcmp(c->path, path) != 0)
        c = c->next;
    if (!c) {
        c = calloc(1, sizeof *c);
        char *copy = strdup(path);
        if (!c || !copy) {
            free(c);
            free(copy);
            return;
        }
        *c = (struct count){.path = copy, .next = s->counts};
        s->counts = c;
    }
    c->puts++;
    if (s->options.count_file)
        write_counts(s);
}

static void take_body(struct sink *s, struct request *r, const char *bytes, size_t n)
{
    if (r->len + n > s->options.max_bytes)
        r->too_large = true;
    if (r->too_large || r->no_memory)
        return; // read on, so that the client hears the answer
    if (r->len + n > r->room) {
        size_t room = r->room * 2 > r->len + n ? r->room * 2 : r->len + n;
        char *body = realloc(r->body, room);
        r->no_memory = !body;
        if (!body)
            return;
        r->body = body;
        r->room = room;
    }
    memcpy(r->body + r->len, bytes, n);
    r->len += n;
}

static enum MHD_Result suspend(struct request *r, double wake)
{
    r->wake = wake;
    r->suspended = true;
    MHD_suspend_connection(r->connection);
    return MHD_YES;
}

static enum MHD_Result finish_put(struct sink *s, struct request *r, const char *path)
{
    const struct options *o = &s->options;
    if (!r->judged) {
        r->judged = true;
        r->fault = s->puts < o->fail_count ? o->fault : FAULT_NONE;
        count_put(s, path);
        if (r->fault == FAULT_HANG)
            return suspend(r, 0);
        if (r->fault == FAULT_SLOW)
            return suspend(r, now_seconds() + o->delay);
    }
    if (r->fault == FAULT_DROP || r->fault == FAULT_HANG) // a hanging request comes back only when the sink ends
        return MHD_NO;
    char text[64];
    snprintf(text, sizeof text, "the sink was told to answer %u\n", o->status);
    if (r->fault == FAULT_STATUS)
        return answer(r->connection, o->status, text, o->retry_after);
    if (r->too_large)
        return answer(r->connection, 413, "the body is larger than --max-bytes\n", NULL);
    if (r->no_memory)
        return answer(r->connection, 507, "no memory for the body\n", NULL);
    struct err e;
    if (save_file(o->dir, path, r->body, r->len, false, &e)) {
        log_line(&s->log, LOG_WARN, "sink.refused", "path=\"%s\" error=\"%s\"", path, e.text);
        return answer_error(r->connection, &e);
    }
    log_line(&s->log, LOG_INFO, "sink.stored", "path=\"%s\" bytes=%zu", path, r->len);
    return answer(r->connection, 201, "stored\n", NULL);
}

// libmicrohttpd calls this once when the headers are there, then for each piece of the body, then with no body left.
static enum MHD_Result on_request(void *context, struct MHD_Connection *connection, const char *url, const char *method,
                                  const char *version, const char *upload_data, size_t *upload_size, void **mine)
{
    struct sink *s = context;
    struct request *r = *mine;
    (void)version;
    if (!r) {
        r = calloc(1, sizeof *r);
        if (!r)
            return MHD_NO;
        *r = (struct request){.connection = connection, .next = s->requests};
        s->requests = r;
        *mine = r;
        return MHD_YES;
    }
    const char *path = url + (url[0] == '/');
    if (strcmp(method, "PUT") == 0 && *upload_size > 0) {
        take_body(s, r, upload_data, *upload_size);
        *upload_size = 0;
        return MHD_YES;
    }
    if (strcmp(method, "PUT") == 0)
        return finish_put(s, r, path);
    if (*upload_size > 0) {
        *upload_size = 0;
        return MHD_YES;
    }
    if (strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0)
        return answer_get(s, connection, path);
    return answer(connection, 405, "only GET, HEAD and PUT\n", NULL);
}

static void on_completed(void *context, struct MHD_Connection *connection, void **mine,
                         enum MHD_RequestTerminationCode why)
{
    struct sink *s = context;
    (void)connection;
    (void)why;
    for (struct request **p = &s->requests; *p; p = &(*p)->next)
        if (*p == *mine) {
            struct request *r = *p;
            *p = r->next;
            free(r->body);
            free(r);
            return;
        }
}

// ---- the loop

// Milliseconds until a slow request is due, at most those that libmicrohttpd allows; -1: no limit.
static int poll_timeout(const struct sink *s)
{
    MHD_UNSIGNED_LONG_LONG ms;
    double least = MHD_get_timeout(s->daemon, &ms) == MHD_YES ? (double)ms : 1e9;
    for (const struct request *r = s->requests; r; r = r->next)
        if (r->suspended && r->wake > 0) {
            double left = (r->wake - now_seconds()) * 1000 + 1;
            least = left < least ? left : least;
        }
    return least >= 1e9 ? -1 : least < 0 ? 0 : (int)least;
}

// Resumes what is due; all: everything, because the sink ends.
static void resume(struct sink *s, bool all)
{
    double now = now_seconds();
    for (struct request *r = s->requests; r; r = r->next)
        if (r->suspended && (all || (r->wake > 0 && r->wake <= now))) {
            r->suspended = false;
            MHD_resume_connection(r->connection);
        }
}

static int serve(struct sink *s)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    struct pollfd fds[] = {{.fd = signalfd(-1, &signals, SFD_CLOEXEC), .events = POLLIN},
                           {.fd = info ? info->epoll_fd : -1, .events = POLLIN}};
    if (fds[0].fd < 0 || fds[1].fd < 0)
        return -1;
    while (!(fds[0].revents & POLLIN)) {
        if (poll(fds, 2, poll_timeout(s)) < 0 && errno != EINTR)
            break;
        resume(s, false);
        MHD_run(s->daemon);
    }
    int result = fds[0].revents & POLLIN ? 0 : -1;
    close(fds[0].fd);
    return result;
}

// ---- the start

static const char help[] =
    "Usage: ditfleet-sink --dir DIR [options]\n"
    "Keeps what is PUT to http://127.0.0.1:PORT/any/path as DIR/any/path, and gives it back to GET.\n"
    "\n"
    "  --dir DIR           where files are kept (must exist)\n"
    "  --port N            port to listen on; 0, the default, takes a free one\n"
    "  --port-file FILE    the port is written there once the sink listens\n"
    "  --count-file FILE   \"COUNT PATH\" lines: PUTs a path, failed ones included\n"
    "  --max-bytes N       largest body, default 67108864; a larger one is answered 413\n"
    "\n"
    "Faults, for tests:\n"
    "  --fail KIND         a status from 300 to 599, or: hang (never answers), refuse (closes the connection without\n"
    "                      an answer), slow (answers after --delay)\n"
    "  --fail-count N      only the first N PUTs fail; without it all do\n"
    "  --retry-after TEXT  sent as Retry-After with the failing status: seconds or an HTTP date\n"
    "  --delay SECONDS     of --fail slow, default 1\n"
    "\n"
    "SIGTERM and SIGINT end it. A full disk is answered 507.\n";

static bool parse_number(const char *text, uint64_t most, uint64_t *out)
{
    char *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);
    *out = n;
    return text[0] >= '0' && text[0] <= '9' && *end == 0 && errno == 0 && n <= most;
}

static bool parse_fault(const char *text, struct options *o)
{
    static const struct {
        const char *name;
        enum fault fault;
    } kinds[] = {{"hang", FAULT_HANG}, {"refuse", FAULT_DROP}, {"slow", FAULT_SLOW}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(text, kinds[i].name) == 0) {
            o->fault = kinds[i].fault;
            return true;
        }
    uint64_t status;
    o->fault = FAULT_STATUS;
    bool good = parse_number(text, 599, &status) && status >= 300;
    o->status = (unsigned)status;
    return good;
}

static bool parse_seconds(const char *text, double *out)
{
    char *end;
    *out = strtod(text, &end);
    return end != text && *end == 0 && *out >= 0 && *out <= 3600;
}

// One option's value; false: it is out of bounds.
static bool set_option(int option, const char *value, struct options *o)
{
    uint64_t n = 0;
    bool good = true;
    switch (option) {
    case 'd':
        o->dir = value;
        break;
    case 'p':
        good = parse_number(value, 65535, &n);
        o->port = (uint16_t)n;
        break;
    case 'P':
        o->port_file = value;
        break;
    case 'c':
        o->count_file = value;
        break;
    case 'm':
        good = parse_number(value, (uint64_t)1 << 40, &o->max_bytes);
        break;
    case 'f':
        good = parse_fault(value, o);
        break;
    case 'n':
        good = parse_number(value, UINT64_MAX, &o->fail_count);
        break;
    case 'r':
        o->retry_after = value;
        break;
    default:
        good = parse_seconds(value, &o->delay);
    }
    return good;
}

// 0: serve; 1: help was asked for; 2: a mistake, which has been told.
static int parse_options(int argc, char **argv, struct options *o)
{
    static const struct option options[] = {
        {"dir", 1, NULL, 'd'},        {"port", 1, NULL, 'p'},
        {"port-file", 1, NULL, 'P'},  {"count-file", 1, NULL, 'c'},
        {"max-bytes", 1, NULL, 'm'},  {"fail", 1, NULL, 'f'},
        {"fail-count", 1, NULL, 'n'}, {"retry-after", 1, NULL, 'r'},
        {"delay", 1, NULL, 's'},      {"help", 0, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    *o = (struct options){.fail_count = UINT64_MAX, .delay = 1, .max_bytes = (uint64_t)64 << 20};
    for (int c, index = 0; (c = getopt_long(argc, argv, "", options, &index)) != -1;) {
        if (c == 'h')
            return 1;
        if (c == '?') {
            fprintf(stderr, "ditfleet-sink: --help lists the options\n");
            return 2;
        }
        if (!set_option(c, optarg, o)) {
            fprintf(stderr, "ditfleet-sink: --%s %s is not allowed; --help says what is\n", options[index].name,
                    optarg);
            return 2;
        }
    }
    if (!o->dir || optind < argc) {
        fprintf(stderr, "ditfleet-sink: %s%s; --help lists the options\n",
                o->dir ? "unexpected argument " : "--dir DIR is needed", o->dir ? argv[optind] : "");
        return 2;
    }
    return 0;
}

static int start(struct sink *s)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(s->options.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct stat st;
    if (stat(s->options.dir, &st) != 0 || !S_ISDIR(st.st_mode)) {
        log_line(&s->log, LOG_ERROR, "sink.start", "error=\"--dir %s is not a directory\"", s->options.dir);
        return -1;
    }
    s->daemon = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, s->options.port, NULL,
                                 NULL, on_request, s, MHD_OPTION_SOCK_ADDR, &address, MHD_OPTION_NOTIFY_COMPLETED,
                                 on_completed, s, MHD_OPTION_LISTENING_ADDRESS_REUSE, 1U, MHD_OPTION_END);
    const union MHD_DaemonInfo *info = s->daemon ? MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_BIND_PORT) : NULL;
    if (!info) {
        log_line(&s->log, LOG_ERROR, "sink.start", "error=\"cannot listen on 127.0.0.1:%u: %s\"", s->options.port,
                 strerror(errno));
        return -1;
    }
    log_line(&s->log, LOG_INFO, "sink.ready", "text=\"listening on 127.0.0.1:%u\" port=%u", info->port, info->port);
    if (!s->options.port_file)
        return 0;
    char text[16];
    int n = snprintf(text, sizeof text, "%u\n", info->port);
    return write_whole(s, s->options.port_file, text, (size_t)n);
}

int main(int argc, char **argv)
{
    struct sink s = {.log = {.fd = 2, .level = LOG_INFO, .prog = "sink", .rank = -1}};
    int parsed = parse_options(argc, argv, &s.options);
    if (parsed == 1)
        fputs(help, stdout);
    if (parsed)
        return parsed == 1 ? 0 : 2;
    int result = start(&s);
    if (result == 0)
        result = serve(&s);
    if (s.daemon) {
        resume(&s, true);
        MHD_stop_daemon(s.daemon);
    }
    for (struct count *c; (c = s.counts);) {
        s.counts = c->next;
        free(c->path);
        free(c);
    }
    return result == 0 ? 0 : 1;
}
