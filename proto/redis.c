// redis.c: socket, deadlines, TLS, Sentinel and reconnection around hiredis' formatter and reader.
#include "proto/redis.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if HIREDIS_MAJOR > 0
typedef size_t reply_elements; // as hiredis counts them
#else
typedef int reply_elements;
#endif

enum { MAX_SENTINELS = 8, SENTINEL_MS = 1000 }; // SENTINEL_MS: each is given so long to answer

struct redis {
    // from the URL
    char *user, *password, *host, *path; // path: Unix socket; else host and port
    char port[16];
    int db;
    bool tls;
    char address[300];
    int connect_ms, command_ms;
    // sentinel://: who knows where the master of this name is; host and port are the last answer
    struct redis *sentinels[MAX_SENTINELS];
    int n_sentinels, next_sentinel;
    char *master;
    SSL_CTX *tls_context; // NULL without TLS
    BIO_METHOD *tls_bio;
    // the connection; fd -1: none
    int fd;
    unsigned connections;
    SSL *ssl;
    redisReader *reader;
    redisReplyObjectFunctions functions; // the reader's, and what it had for arrays
    void *(*create_array)(const redisReadTask *task, reply_elements elements);
    char *out; // bytes not yet written: out[sent..length)
    size_t sent, length, capacity;
    enum redis_problem problem;
    bool no_functions; // of this server, or for this user
};

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

// ---- the URL

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
}

// A malloc'd copy of text[0..length) with %XX decoded; NULL: no memory, a bad escape or an encoded zero byte.
static char *percent_decode(const char *text, size_t length)
{
    char *copy = malloc(length + 1), *to = copy;
    for (size_t i = 0; copy && i < length; i++) {
        int c = (unsigned char)text[i];
        if (c == '%') {
            int high = i + 2 < length ? hex_digit(text[i + 1]) : -1;
            int low = i + 2 < length ? hex_digit(text[i + 2]) : -1;
            if (high < 0 || low < 0 || high + low == 0) {
                free(copy);
                return NULL;
            }
            c = high * 16 + low;
            i += 2;
        }
        *to++ = (char)c;
    }
    if (copy)
        *to = 0;
    return copy;
}

// A decimal number that is the whole of text[0..length), 0 to max; -1 otherwise.
static long small_number(const char *text, size_t length, long max)
{
    long n = 0;
    if (length == 0 || length > 6)
        return -1;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -1;
        n = n * 10 + (text[i] - '0');
    }
    return n <= max ? n : -1;
}

static int bad_url(struct err *e, const char *why)
{
    return err_set(
        e, ERR_INVALID,
        "Redis URL: %s; allowed: redis://[user[:password]@]host[:port][/db], rediss://... , unix:///path[?db=N], "
        "sentinel://[user[:password]@]host[:port][,host[:port]...]/master[/db]",
        why);
}

static int parse_unix(struct redis *r, const char *rest, struct err *e)
{
    size_t length = strcspn(rest, "?");
    if (rest[0] != '/')
        return bad_url(e, "the path of a Unix socket must be absolute");
    if (rest[length]) {
        const char *query = rest + length + 1;
        if (strncmp(query, "db=", 3) != 0 || (r->db = (int)small_number(query + 3, strlen(query + 3), 65535)) < 0)
            return bad_url(e, "the query is not db=N");
    }
    r->path = percent_decode(rest, length);
    if (!r->path)
        return bad_url(e, "the path has a bad percent escape");
    if (strlen(r->path) >= sizeof((struct sockaddr_un *)0)->sun_path)
        return bad_url(e, "the path of a Unix socket may have at most 107 bytes");
    snprintf(r->address, sizeof r->address, "unix:%s", r->path);
    return 0;
}

static int parse_userinfo(struct redis *r, const char *text, size_t length, struct err *e)
{
    const char *colon = memchr(text, ':', length);
    size_t user = colon ? (size_t)(colon - text) : length;
    r->user = percent_decode(text, user);
    if (colon)
        r->password = percent_decode(colon + 1, length - user - 1);
    if (!r->user || (colon && !r->password))
        return bad_url(e, "user or password has a bad percent escape");
    return 0;
}

// host[:port] in host..end.
static int parse_host(struct redis *r, const char *host, const char *end, const char *default_port, struct err *e)
{
    const char *host_end = *host == '[' ? memchr(host, ']', (size_t)(end - host)) : NULL;
    if (*host == '[' && !host_end)
        return bad_url(e, "an IPv6 address needs its closing bracket");
    const char *colon = memchr(host_end ? host_end : host, ':', (size_t)(end - (host_end ? host_end : host)));
    if (host_end)
        host++;
    else
        host_end = colon ? colon : end;
    if (host == host_end || host_end - host > 255)
        return bad_url(e, "the host is missing or longer than 255 bytes");
    if (colon && small_number(colon + 1, (size_t)(end - colon - 1), 65535) < 1)
        return bad_url(e, "the port is not a number from 1 to 65535");
    snprintf(r->port, sizeof r->port, "%.*s", colon ? (int)(end - colon - 1) : 5, colon ? colon + 1 : default_port);
    r->host = strndup(host, (size_t)(host_end - host));
    if (!r->host)
        return err_set(e, ERR_NO_MEMORY, "out of memory for a Redis connection");
    snprintf(r->address, sizeof r->address, "%s://%s:%s", r->tls ? "rediss" : "redis", r->host, r->port);
    return 0;
}

// What is before the hosts, if anything is. *hosts: where they begin.
static int parse_user(struct redis *r, const char *rest, size_t length, const char **hosts, struct err *e)
{
    const char *at = memrchr(rest, '@', length);
    *hosts = at ? at + 1 : rest;
    return at ? parse_userinfo(r, rest, (size_t)(at - rest), e) : 0;
}

static int parse_tcp(struct redis *r, const char *rest, struct err *e)
{
    size_t length = strcspn(rest, "/?#");
    const char *host, *end = rest + length;
    TRY(parse_user(r, rest, length, &host, e));
    TRY(parse_host(r, host, end, "6379", e));
    if (*end == '/' && end[1] && (r->db = (int)small_number(end + 1, strlen(end + 1), 65535)) < 0)
        return bad_url(e, "the database is not a number");
    if (*end == '?' || *end == '#')
        return bad_url(e, "a query is not known here");
    return 0;
}

static struct redis *new_redis(const struct redis_options *options)
{
    struct redis *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->fd = -1;
    r->connect_ms = options && options->connect_ms ? options->connect_ms : 5000;
    r->command_ms = options && options->command_ms ? options->command_ms : 5000;
    return r;
}

static int add_sentinel(struct redis *r, const char *host, const char *end, struct err *e)
{
    if (r->n_sentinels == MAX_SENTINELS)
        return bad_url(e, "at most 8 sentinels are asked");
    struct redis *s = new_redis(&(struct redis_options){.connect_ms = SENTINEL_MS, .command_ms = SENTINEL_MS});
    if (!s)
        return err_set(e, ERR_NO_MEMORY, "out of memory for a Redis connection");
    r->sentinels[r->n_sentinels++] = s;
    return parse_host(s, host, end, "26379", e);
}

// The user and password are the master's; sentinels are asked without.
static int parse_sentinels(struct redis *r, const char *rest, struct err *e)
{
    size_t length = strcspn(rest, "/?#");
    const char *hosts, *end = rest + length;
    TRY(parse_user(r, rest, length, &hosts, e));
    for (const char *next, *host = hosts; host <= end; host = next + 1) {
        next = memchr(host, ',', (size_t)(end - host));
        next = next ? next : end;
        TRY(add_sentinel(r, host, next, e));
    }
    const char *name = *end == '/' ? end + 1 : end, *db = name + strcspn(name, "/");
    if (db == name || strcspn(name, "?#") != strlen(name))
        return bad_url(e, "the name of the master is missing, or has a query behind it");
    if (*db && (r->db = (int)small_number(db + 1, strlen(db + 1), 65535)) < 0)
        return bad_url(e, "the database is not a number");
    r->master = percent_decode(name, (size_t)(db - name));
    if (!r->master)
        return bad_url(e, "the master's name has a bad percent escape");
    snprintf(r->address, sizeof r->address, "sentinel://%.*s/%.64s", (int)(end - hosts), hosts, r->master);
    return 0;
}

static int parse_url(struct redis *r, const char *url, struct err *e)
{
    if (strncmp(url, "unix://", 7) == 0)
        return parse_unix(r, url + 7, e);
    r->tls = strncmp(url, "rediss://", 9) == 0;
    if (r->tls || strncmp(url, "redis://", 8) == 0)
        return parse_tcp(r, url + (r->tls ? 9 : 8), e);
    if (strncmp(url, "sentinel://", 11) == 0)
        return parse_sentinels(r, url + 11, e);
    return bad_url(e, "unknown scheme");
}

// ---- TLS

// OpenSSL's socket BIO writes by write(2), which raises SIGPIPE on a lost connection; this one does not.
static int bio_send(BIO *bio, const char *data, int length)
{
    int fd = -1;
    BIO_get_fd(bio, &fd);
    BIO_clear_retry_flags(bio);
    ssize_t n = send(fd, data, (size_t)length, MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        BIO_set_retry_write(bio);
    return (int)n;
}

static int tls_error(struct err *e, enum err_code code, const char *doing)
{
    char reason[200] = "no reason given";
    unsigned long n = ERR_peek_last_error();
    if (n)
        ERR_error_string_n(n, reason, sizeof reason);
    ERR_clear_error();
    return err_set(e, code, "TLS to Redis: %s: %s", doing, reason);
}

static int tls_setup(struct redis *r, const struct redis_options *o, struct err *e)
{
    r->tls_context = SSL_CTX_new(TLS_client_method());
    const BIO_METHOD *socket_bio = BIO_s_socket();
    r->tls_bio = BIO_meth_new(BIO_TYPE_SOCKET, "socket without SIGPIPE");
    if (!r->tls_context || !r->tls_bio)
        return tls_error(e, ERR_NO_MEMORY, "setting up");
    BIO_meth_set_write(r->tls_bio, bio_send);
    BIO_meth_set_read(r->tls_bio, BIO_meth_get_read(socket_bio));
    BIO_meth_set_ctrl(r->tls_bio, BIO_meth_get_ctrl(socket_bio));
    BIO_meth_set_create(r->tls_bio, BIO_meth_get_create(socket_bio));
    BIO_meth_set_destroy(r->tls_bio, BIO_meth_get_destroy(socket_bio));
    SSL_CTX_set_verify(r->tls_context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_min_proto_version(r->tls_context, TLS1_2_VERSION);
    SSL_CTX_set_mode(r->tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    int ok = o && o->ca_file ? SSL_CTX_load_verify_locations(r->tls_context, o->ca_file, NULL)
                             : SSL_CTX_set_default_verify_paths(r->tls_context);
    if (!ok)
        return tls_error(e, ERR_INVALID, "reading the file of trusted certificates");
    if (o && o->cert_file && SSL_CTX_use_certificate_chain_file(r->tls_context, o->cert_file) != 1)
        return tls_error(e, ERR_INVALID, "reading the client's certificate");
    if (o && o->key_file && SSL_CTX_use_PrivateKey_file(r->tls_context, o->key_file, SSL_FILETYPE_PEM) != 1)
        return tls_error(e, ERR_INVALID, "reading the client's key");
    return 0;
}

// ---- opening and closing

int redis_open(struct redis **redis, const char *url, const struct redis_options *options, struct err *e)
{
    *redis = NULL;
    struct redis *r = new_redis(options);
    if (!r)
        return err_set(e, ERR_NO_MEMORY, "out of memory for a Redis connection");
    int rc = parse_url(r, url, e);
    if (rc == 0 && r->tls)
        rc = tls_setup(r, options, e);
    if (rc != 0) {
        redis_close(r);
        return rc;
    }
    *redis = r;
    return 0;
}

void redis_disconnect(struct redis *r)
{
    if (r->ssl)
        SSL_free(r->ssl); // the descriptor stays ours: BIO_NOCLOSE
    if (r->fd >= 0)
        close(r->fd);
    if (r->reader)
        redisReaderFree(r->reader);
    r->ssl = NULL;
    r->fd = -1;
    r->reader = NULL;
    r->sent = r->length = 0;
}

static void free_secret(char *text)
{
    if (text)
        OPENSSL_cleanse(text, strlen(text));
    free(text);
}

void redis_close(struct redis *r)
{
    if (!r)
        return;
    redis_disconnect(r);
    for (int i = 0; i < r->n_sentinels; i++)
        redis_close(r->sentinels[i]);
    free(r->master);
    SSL_CTX_free(r->tls_context);
    BIO_meth_free(r->tls_bio);
    free_secret(r->password);
    free(r->user);
    free(r->host);
    free(r->path);
    free(r->out);
    free(r);
}

const char *redis_address(const struct redis *r)
{
    return r->address;
}

unsigned redis_connections(const struct redis *r)
{
    return r->connections;
}

enum redis_problem redis_problem(const struct redis *r)
{
    return r->problem;
}

// ---- moving bytes

static int lost(struct redis *r, struct err *e, const char *why)
{
    redis_disconnect(r);
    return err_set(e, ERR_UNAVAILABLE, "Redis at %s: %s", r->address, why);
}

static int wait_fd(struct redis *r, short events, int64_t deadline, short *got, struct err *e)
{
    *got = 0;
    for (;;) {
        int64_t left = deadline - now_ms();
        struct pollfd p = {.fd = r->fd, .events = events};
        int n = poll(&p, 1, left > INT32_MAX ? INT32_MAX : left < 0 ? 0 : (int)left);
        if (n > 0) {
            *got = p.revents;
            return 0;
        }
        if (n < 0 && errno != EINTR)
            return lost(r, e, strerror(errno));
        if (n == 0 && left <= 0) {
            redis_disconnect(r);
            return err_set(e, ERR_TIMEOUT, "Redis at %s: no answer before the deadline", r->address);
        }
    }
}

enum { IO_WANT_READ = -1, IO_WANT_WRITE = -2, IO_LOST = -3, IO_EOF = -4 };

static long tls_result(struct redis *r, int n)
{
    if (n > 0)
        return n;
    int why = SSL_get_error(r->ssl, n);
    ERR_clear_error();
    return why == SSL_ERROR_WANT_READ     ? IO_WANT_READ
           : why == SSL_ERROR_WANT_WRITE  ? IO_WANT_WRITE
           : why == SSL_ERROR_ZERO_RETURN ? IO_EOF
                                          : IO_LOST;
}

static long read_some(struct redis *r, char *buffer, size_t size)
{
    if (r->ssl)
        return tls_result(r, SSL_read(r->ssl, buffer, (int)size));
    ssize_t n = recv(r->fd, buffer, size, 0);
    if (n >= 0)
        return n == 0 ? IO_EOF : n;
    return errno == EAGAIN || errno == EINTR ? IO_WANT_READ : IO_LOST;
}

static long write_some(struct redis *r)
{
    size_t left = r->length - r->sent;
    if (r->ssl)
        return tls_result(r, SSL_write(r->ssl, r->out + r->sent, left > 1 << 20 ? 1 << 20 : (int)left));
    ssize_t n = send(r->fd, r->out + r->sent, left, MSG_NOSIGNAL);
    if (n >= 0)
        return n;
    return errno == EAGAIN || errno == EINTR ? IO_WANT_WRITE : IO_LOST;
}

// Reads what is there into the reader. *want is what to poll for when nothing was.
static int drain_input(struct redis *r, short *want, struct err *e)
{
    char buffer[16384];
    long n = read_some(r, buffer, sizeof buffer);
    *want = n == IO_WANT_WRITE ? POLLOUT : POLLIN;
    if (n == IO_EOF)
        return lost(r, e, "the server closed the connection");
    if (n == IO_LOST)
        return lost(r, e, "the connection broke");
    if (n > 0 && redisReaderFeed(r->reader, buffer, (size_t)n) != REDIS_OK)
        return lost(r, e, "the reader ran out of memory");
    if (n > 0)
        *want = 0;
    return 0;
}

// Writes all of out. Reads meanwhile, so that a server whose replies we do not take cannot stop reading ours.
static int flush(struct redis *r, int64_t deadline, struct err *e)
{
    while (r->sent < r->length) {
        long n = write_some(r);
        if (n == IO_LOST || n == IO_EOF)
            return lost(r, e, "the connection broke");
        if (n > 0) {
            r->sent += (size_t)n;
            continue;
        }
        short got, want;
        TRY(wait_fd(r, n == IO_WANT_READ ? POLLIN : POLLIN | POLLOUT, deadline, &got, e));
        if (got & (POLLIN | POLLHUP | POLLERR))
            TRY(drain_input(r, &want, e));
    }
    r->sent = r->length = 0;
    return 0;
}

// ---- connecting

static int connect_fd(struct redis *r, int family, const struct sockaddr *address, socklen_t length, int64_t deadline,
                      struct err *e)
{
    r->fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (r->fd < 0)
        return err_set(e, ERR_IO, "Redis at %s: socket: %s", r->address, strerror(errno));
    int failure = connect(r->fd, address, length) == 0 ? 0 : errno;
    if (failure == EINPROGRESS || failure == EAGAIN) {
        short got;
        socklen_t size = sizeof failure;
        TRY(wait_fd(r, POLLOUT, deadline, &got, e));
        if (getsockopt(r->fd, SOL_SOCKET, SO_ERROR, &failure, &size) < 0)
            failure = errno;
    }
    if (failure)
        return lost(r, e, strerror(failure));
    if (family != AF_UNIX) {
        int on = 1;
        setsockopt(r->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        setsockopt(r->fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    }
    return 0;
}

static int connect_socket(struct redis *r, int64_t deadline, struct err *e)
{
    if (r->path) {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        memcpy(a.sun_path, r->path, strlen(r->path) + 1);
        return connect_fd(r, AF_UNIX, (struct sockaddr *)&a, sizeof a, deadline, e);
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    int rc = getaddrinfo(r->host, r->port, &hints, &list);
    if (rc != 0)
        return err_set(e, ERR_UNAVAILABLE, "Redis at %s: %s", r->address, gai_strerror(rc));
    rc = ERR_UNAVAILABLE;
    for (struct addrinfo *a = list; a && rc != 0; a = a->ai_next)
        rc = connect_fd(r, a->ai_family, a->ai_addr, a->ai_addrlen, deadline, e);
    freeaddrinfo(list);
    return rc;
}

static int tls_connect(struct redis *r, int64_t deadline, struct err *e)
{
    r->ssl = SSL_new(r->tls_context);
    BIO *bio = BIO_new(r->tls_bio);
    if (!r->ssl || !bio) {
        BIO_free(bio);
        return tls_error(e, ERR_NO_MEMORY, "setting up");
    }
    BIO_set_fd(bio, r->fd, BIO_NOCLOSE);
    SSL_set_bio(r->ssl, bio, bio);
    // Either the name or the address must be in the certificate.
    X509_VERIFY_PARAM *param = SSL_get0_param(r->ssl);
    if (X509_VERIFY_PARAM_set1_ip_asc(param, r->host) != 1) {
        ERR_clear_error();
        if (SSL_set1_host(r->ssl, r->host) != 1 || SSL_set_tlsext_host_name(r->ssl, r->host) != 1)
            return tls_error(e, ERR_INVALID, "setting the host's name");
    }
    for (;;) {
        int n = SSL_connect(r->ssl), why = SSL_get_error(r->ssl, n);
        short got;
        if (n == 1)
            return 0;
        if (why != SSL_ERROR_WANT_READ && why != SSL_ERROR_WANT_WRITE)
            return tls_error(e, ERR_UNAVAILABLE, "handshake");
        TRY(wait_fd(r, why == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT, deadline, &got, e));
    }
}

static int get_reply(struct redis *r, redisReply **reply, int64_t deadline, struct err *e);

static int log_in(struct redis *r, int64_t deadline, struct err *e)
{
    char db[12];
    snprintf(db, sizeof db, "%d", r->db);
    bool named = r->user && *r->user;
    const char *auth[] = {"AUTH", named ? r->user : r->password, r->password}, *select[] = {"SELECT", db};
    if (r->password) {
        TRY(redis_append_argv(r, e, named ? 3 : 2, auth, NULL));
        int rc = get_reply(r, NULL, deadline, e);
        if (r->out)
            OPENSSL_cleanse(r->out, r->capacity);
        TRY(rc);
    }
    if (r->db > 0) {
        TRY(redis_append_argv(r, e, 2, select, NULL));
        TRY(get_reply(r, NULL, deadline, e));
    }
    return 0;
}

// A reply says how many elements it has before they come, and hiredis makes room for all of them at once. None of ours
// comes near this.
enum { MOST_ELEMENTS = 1 << 20 };

static void *create_array(const redisReadTask *task, reply_elements elements)
{
    const struct redis *r = task->privdata;
    return elements <= MOST_ELEMENTS ? r->create_array(task, elements) : NULL;
}

static int open_reader(struct redis *r, struct err *e)
{
    r->reader = redisReaderCreate();
    if (!r->reader)
        return err_set(e, ERR_NO_MEMORY, "out of memory for a Redis connection");
    r->functions = *r->reader->fn;
    r->create_array = r->functions.createArray;
    r->functions.createArray = create_array;
    r->reader->fn = &r->functions;
    r->reader->privdata = r;
    return 0;
}

// ---- Sentinel: where the master is now

// Takes over what one sentinel says. ERR_UNAVAILABLE: it cannot be asked, or does not know.
static int ask_sentinel(struct redis *r, struct redis *sentinel, struct err *e)
{
    redisReply *answer = NULL;
    TRY(redis_command(sentinel, &answer, e, "SENTINEL get-master-addr-by-name %s", r->master));
    const bool knows = answer->type == REDIS_REPLY_ARRAY && answer->elements == 2 &&
                       answer->element[0]->type == REDIS_REPLY_STRING && answer->element[1]->type == REDIS_REPLY_STRING;
    char *host = knows ? strdup(answer->element[0]->str) : NULL;
    if (host) {
        free(r->host);
        r->host = host;
        snprintf(r->port, sizeof r->port, "%.15s", answer->element[1]->str);
        snprintf(r->address, sizeof r->address, "redis://%.200s:%s (%.64s)", host, r->port, r->master);
    }
    freeReplyObject(answer);
    if (!knows)
        return err_set(e, ERR_UNAVAILABLE, "the sentinel at %s knows no master %.64s", sentinel->address, r->master);
    return host ? 0 : err_set(e, ERR_NO_MEMORY, "out of memory for a Redis connection");
}

// Asks one after the other, first the one that answered last time.
static int find_master(struct redis *r, struct err *e)
{
    int rc = ERR_UNAVAILABLE;
    for (int i = 0; i < r->n_sentinels && rc != 0; i++) {
        rc = ask_sentinel(r, r->sentinels[r->next_sentinel], e);
        if (rc != 0)
            r->next_sentinel = (r->next_sentinel + 1) % r->n_sentinels;
    }
    return rc;
}

// A sentinel may still name one that was the master. (Whether a user may ask is access control's; a write would tell.)
static int check_master(struct redis *r, int64_t deadline, struct err *e)
{
    static const char *role[] = {"ROLE"};
    redisReply *answer = NULL;
    TRY(redis_append_argv(r, e, 1, role, NULL));
    int rc = get_reply(r, &answer, deadline, e);
    if (rc != 0)
        return r->problem == REDIS_PROBLEM_NOPERM ? 0 : rc;
    const bool master = answer->type == REDIS_REPLY_ARRAY && answer->elements > 0 &&
                        answer->element[0]->type == REDIS_REPLY_STRING &&
                        strcmp(answer->element[0]->str, "master") == 0;
    freeReplyObject(answer);
    return master ? 0 : err_set(e, ERR_UNAVAILABLE, "Redis at %s is no master, or not yet", r->address);
}

static int ensure_connected(struct redis *r, struct err *e)
{
    if (r->fd >= 0)
        return 0;
    if (r->n_sentinels > 0)
        TRY(find_master(r, e));
    int64_t deadline = now_ms() + r->connect_ms;
    int rc = connect_socket(r, deadline, e);
    if (rc == 0 && r->tls)
        rc = tls_connect(r, deadline, e);
    if (rc == 0)
        rc = open_reader(r, e);
    if (rc == 0)
        rc = log_in(r, deadline, e);
    if (rc == 0 && r->n_sentinels > 0)
        rc = check_master(r, deadline, e);
    r->connections++;
    r->no_functions = false; // another server may have them
    if (rc != 0)
        redis_disconnect(r);
    return rc;
}

// ---- commands

static int append_bytes(struct redis *r, const char *bytes, size_t length, struct err *e)
{
    if (r->length + length > r->capacity) {
        size_t capacity = (r->length + length) * 2;
        char *grown = realloc(r->out, capacity);
        if (!grown)
            return err_set(e, ERR_NO_MEMORY, "out of memory for a command to Redis");
        r->out = grown;
        r->capacity = capacity;
    }
    memcpy(r->out + r->length, bytes, length);
    r->length += length;
    return 0;
}

int redis_append_argv(struct redis *r, struct err *e, int argc, const char **argv, const size_t *lengths)
{
    r->problem = REDIS_PROBLEM_NONE;
    TRY(ensure_connected(r, e));
    char *command = NULL;
    long long length = redisFormatCommandArgv(&command, argc, argv, lengths);
    if (length < 0)
        return err_set(e, ERR_NO_MEMORY, "out of memory for a command to Redis");
    int rc = append_bytes(r, command, (size_t)length, e);
    redisFreeCommand(command);
    return rc;
}

// What an error reply's first word means. Words not listed are REDIS_PROBLEM_OTHER and ERR_INTERNAL.
static const struct {
    const char *word;
    enum err_code code;
    enum redis_problem problem;
} refusals[] = {
    {"NOSCRIPT", ERR_NOT_FOUND, REDIS_PROBLEM_NOSCRIPT},  {"NOGROUP", ERR_NOT_FOUND, REDIS_PROBLEM_NOGROUP},
    {"BUSYGROUP", ERR_CONFLICT, REDIS_PROBLEM_BUSYGROUP}, {"LOADING", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
    {"READONLY", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},    {"BUSY", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
    {"MASTERDOWN", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},  {"CLUSTERDOWN", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
    {"TRYAGAIN", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},    {"UNBLOCKED", ERR_NOT_FOUND, REDIS_PROBLEM_NOGROUP},
    {"OOM", ERR_NO_MEMORY, REDIS_PROBLEM_OTHER},          {"MISCONF", ERR_IO, REDIS_PROBLEM_OTHER},
    {"NOREPLICAS", ERR_UNAVAILABLE, REDIS_PROBLEM_OTHER}, {"NOPERM", ERR_REFUSED, REDIS_PROBLEM_NOPERM},
    {"NOAUTH", ERR_REFUSED, REDIS_PROBLEM_OTHER},         {"WRONGPASS", ERR_REFUSED, REDIS_PROBLEM_OTHER},
    {"WRONGTYPE", ERR_CORRUPT, REDIS_PROBLEM_OTHER},
};

static int refuse(struct redis *r, const char *text, struct err *e)
{
    enum err_code code = ERR_INTERNAL;
    r->problem = REDIS_PROBLEM_OTHER;
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        size_t length = strlen(refusals[i].word);
        if (strncmp(text, refusals[i].word, length) == 0 && (text[length] == ' ' || text[length] == 0)) {
            code = refusals[i].code;
            r->problem = refusals[i].problem;
        }
    }
    if (strncmp(text, "ERR The user executing the script can't", 39) == 0) { // NOPERM, as scripts of 7.0 say it
        code = ERR_REFUSED;
        r->problem = REDIS_PROBLEM_NOPERM;
    }
    if (strncmp(text, "ERR Function not found", 22) == 0)
        r->problem = REDIS_PROBLEM_NOFUNCTION;
    if (strncmp(text, "ERR unknown command", 19) == 0 || strncmp(text, "ERR unknown subcommand", 22) == 0 ||
        (r->problem == REDIS_PROBLEM_NOPERM && (strstr(text, "'fcall'") || strstr(text, "'function|load'"))))
        r->problem = REDIS_PROBLEM_NOCOMMAND;
    // Redis echoes the arguments of commands it does not know; they may be secrets.
    const char *echo = strstr(text, ", with args");
    int length = echo ? (int)(echo - text) : (int)strnlen(text, 200);
    err_set(e, code, "Redis at %s refused: %.*s", r->address, length, text);
    // A demoted server stays demoted: the next attempt must look up the address again.
    if (strncmp(text, "READONLY", 8) == 0)
        redis_disconnect(r);
    return code;
}

static int get_reply(struct redis *r, redisReply **reply, int64_t deadline, struct err *e)
{
    void *got = NULL;
    if (reply)
        *reply = NULL;
    if (r->fd < 0)
        return err_set(e, ERR_UNAVAILABLE, "Redis at %s: the connection was lost", r->address);
    r->problem = REDIS_PROBLEM_NONE;
    TRY(flush(r, deadline, e));
    for (;;) {
        short want, events;
        if (redisReaderGetReply(r->reader, &got) != REDIS_OK)
            return lost(r, e, "it does not speak the Redis protocol");
        if (got)
            break;
        TRY(drain_input(r, &want, e));
        if (want)
            TRY(wait_fd(r, want, deadline, &events, e));
    }
    redisReply *answer = got;
    if (answer->type == REDIS_REPLY_ERROR) {
        int rc = refuse(r, answer->str, e);
        freeReplyObject(answer);
        return rc;
    }
    if (reply)
        *reply = answer;
    else
        freeReplyObject(answer);
    return 0;
}

int redis_get_reply(struct redis *r, redisReply **reply, struct err *e)
{
    return get_reply(r, reply, now_ms() + r->command_ms, e);
}

int redis_command_blocking(struct redis *r, redisReply **reply, struct err *e, int block_ms, int argc,
                           const char **argv, const size_t *lengths)
{
    if (reply)
        *reply = NULL;
    TRY(redis_append_argv(r, e, argc, argv, lengths));
    return get_reply(r, reply, now_ms() + r->command_ms + block_ms, e);
}

int redis_command_argv(struct redis *r, redisReply **reply, struct err *e, int argc, const char **argv,
                       const size_t *lengths)
{
    return redis_command_blocking(r, reply, e, 0, argc, argv, lengths);
}

int redis_command(struct redis *r, redisReply **reply, struct err *e, const char *format, ...)
{
    char *command = NULL;
    va_list args;
    if (reply)
        *reply = NULL;
    r->problem = REDIS_PROBLEM_NONE;
    TRY(ensure_connected(r, e));
    va_start(args, format);
    int length = redisvFormatCommand(&command, format, args);
    va_end(args);
    if (length < 0)
        return err_set(e, ERR_INTERNAL, "a command to Redis could not be formatted");
    int rc = append_bytes(r, command, (size_t)length, e);
    redisFreeCommand(command);
    return rc ? rc : redis_get_reply(r, reply, e);
}

// ---- scripts

void redis_script(struct redis_script *script, const char *text, size_t length)
{
    unsigned char digest[SHA_DIGEST_LENGTH];
    SHA1((const unsigned char *)text, length, digest);
    script->text = text;
    script->length = length;
    script->reads = script->function = false;
    for (size_t i = 0; i < sizeof digest; i++)
        snprintf(script->sha1 + 2 * i, 3, "%02x", digest[i]);
}

enum { EVAL_MAX_ARGS = 1024 };

// A call by whichever command: VERB what 1 key argument...
struct call {
    const char *word[EVAL_MAX_ARGS + 4];
    size_t length[EVAL_MAX_ARGS + 4];
    int n;
    char function[64];
};

static int run_call(struct redis *r, struct call *c, const char *verb, const char *what, size_t length,
                    redisReply **reply, struct err *e)
{
    c->word[0] = verb;
    c->length[0] = strlen(verb);
    c->word[1] = what;
    c->length[1] = length;
    return redis_command_argv(r, reply, e, c->n, c->word, c->length);
}

// The server keeps it from now on; another may have brought it a moment before.
static int load_function(struct redis *r, const struct redis_script *script, const char *name, struct err *e)
{
    char *library = NULL;
    const int length = asprintf(&library, "#!lua name=%s\nlocal FUNCTION_NAME = '%s'\n%.*s", name, name,
                                (int)script->length, script->text);
    if (length < 0)
        return err_set(e, ERR_NO_MEMORY, "no memory to send a function to Redis");
    const char *argv[] = {"FUNCTION", "LOAD", "REPLACE", library};
    const int rc = redis_command_argv(r, NULL, e, 4, argv, NULL);
    free(library);
    return rc;
}

// *done: the answer is the function's; else there are no functions here.
static int call_function(struct redis *r, const struct redis_script *script, struct call *c, redisReply **reply,
                         bool *done, struct err *e)
{
    const char *name = c->function;
    snprintf(c->function, sizeof c->function, "ditfleet_%s", script->sha1);
    int rc = run_call(r, c, "FCALL", name, strlen(name), reply, e);
    if (rc != 0 && r->problem == REDIS_PROBLEM_NOFUNCTION) {
        rc = load_function(r, script, name, e);
        if (rc == 0)
            rc = run_call(r, c, "FCALL", name, strlen(name), reply, e);
    }
    *done = rc == 0 || r->problem != REDIS_PROBLEM_NOCOMMAND;
    r->no_functions = !*done;
    return rc;
}

int redis_eval(struct redis *r, const struct redis_script *script, redisReply **reply, struct err *e, const char *key,
               int argc, const char **argv, const size_t *lengths)
{
    struct call c = {.n = argc + 4};
    bool done = false;
    if (argc > EVAL_MAX_ARGS)
        return err_set(e, ERR_INTERNAL, "a script call has %d arguments; at most %d", argc, EVAL_MAX_ARGS);
    const char *const fixed[] = {"1", key};
    for (int i = 0; i < argc + 2; i++) {
        c.word[2 + i] = i < 2 ? fixed[i] : argv[i - 2];
        c.length[2 + i] = i < 2 || !lengths ? strlen(c.word[2 + i]) : lengths[i - 2];
    }
    if (script->function && !script->reads && !r->no_functions) {
        const int rc = call_function(r, script, &c, reply, &done, e);
        if (done)
            return rc;
    }
    const int rc = run_call(r, &c, script->reads ? "EVALSHA_RO" : "EVALSHA", script->sha1, 40, reply, e);
    if (rc == 0 || r->problem != REDIS_PROBLEM_NOSCRIPT)
        return rc;
    return run_call(r, &c, script->reads ? "EVAL_RO" : "EVAL", script->text, script->length, reply, e);
}
