// tcp.c: ranks of several hosts. Every two have two connections: one for messages, one for alarms.
//
// A collective is one header to every other member, the piece for it right behind, and the same from every other. Two
// ranks call the collectives that both are in in one order, so headers meet their like; one that is not tells of a
// mistake, which stops all. All members hear of all, so that none goes on while another is late.
//
// A thread waits for alarms: a reason to stop, or the end of a rank that did not say goodbye. They reach ranks that
// compute, or wait for a device. A host that falls silent is found by keepalive, which only alarms' connections can
// have: nothing is ever under way there.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "proto/clock.h"
#include "worker/comm/message.h"

#define HELLO_MAGIC  UINT64_C(0x7063742d74666964) // "dift-tcp"
#define HEADER_MAGIC 0x64726d68U
#define TCP_VERSION  1
enum { CHANNEL_MESSAGES, CHANNEL_ALARMS, CHANNELS };
// A host that answers nothing for KEEP_IDLE + KEEP_TIMES * KEEP_EVERY seconds is gone.
enum { KEEP_IDLE = 2, KEEP_EVERY = 1, KEEP_TIMES = 3 };
enum { REASON_MS = 500, STRANGERS = 64, HEARING_MS = 1000 };

// The first words over a connection, either way.
struct hello {
    uint64_t magic;
    uint32_t version, size, rank, channel;
    char secret[COMM_TCP_SECRET];
};

struct header {
    uint32_t magic, op;
    uint64_t group, sequence; // which collective
    int64_t bytes;            // that follow
    uint64_t agreed;          // of what all members have to say alike
};

struct alarm {
    char reason[256]; // "": goodbye
};

struct tcp_world {
    int rank, size;
    int fd[CHANNELS][COMM_MAX_RANKS]; // -1: none
    int stopped;                      // eventfd, readable from an abort on
    int leaving;                      // eventfd, ends the watcher
    atomic_bool told;                 // others know of the abort
    bool watched;
    pthread_t watcher;
    struct comm *root;
    struct abort_note note;
};

struct tcp_comm {
    struct comm base;
    struct tcp_world *world;
    uint64_t group;
    uint8_t members[COMM_MAX_RANKS]; // their ranks in the world
};

static uint64_t digest(uint64_t from, const int64_t *words, int n)
{
    for (int i = 0; i < n; i++) { // FNV-1a, by words
        from = (from ^ (uint64_t)words[i]) * UINT64_C(0x100000001b3);
        from ^= from >> 29; // a product's high bits say more than its low ones
    }
    return from;
}

// ---- a collective

// What is under way between this rank and another member.
struct talk {
    int fd;
    struct header out, in;
    struct piece piece;
    uint8_t *to;
    int64_t sent, got; // bytes, headers included
};

static int64_t out_bytes(const struct talk *t)
{
    return (int64_t)sizeof t->out + t->out.bytes;
}

static bool heard(const struct talk *t)
{
    return t->got >= (int64_t)sizeof t->in;
}

static int64_t in_bytes(const struct talk *t)
{
    return (int64_t)sizeof t->in + (heard(t) ? t->in.bytes : 0);
}

static bool is_over(const struct talk *t)
{
    return t->sent == out_bytes(t) && heard(t) && t->got == in_bytes(t);
}

// The end of a connection comes with a reason, or a moment before it.
static int fail_gone(struct tcp_comm *c, enum comm_op op, int member)
{
    struct pollfd stopped = {.fd = c->world->stopped, .events = POLLIN};
    if (!comm_aborted(&c->base))
        poll(&stopped, 1, REASON_MS);
    return comm_aborted(&c->base)
               ? comm_fail_aborted(&c->base)
               : comm_fail(&c->base, ERR_UNAVAILABLE, op, "rank %d of the whole has left", c->members[member]);
}

// Stops everybody: ranks that see nothing wrong would wait for us.
static int fail_for_all(struct tcp_comm *c, int code)
{
    comm_abort(&c->base, c->base.root->error.text);
    return code;
}

static int check_header(struct tcp_comm *c, const struct message *m, const struct talk *t, int i)
{
    const struct header *h = &t->in;
    if (h->magic != HEADER_MAGIC || h->op != m->op || h->group != c->group || h->sequence != c->base.sequence)
        return fail_for_all(c, comm_fail(&c->base, ERR_INTERNAL, m->op,
                                         "rank %d called another collective (kind %u, number %llu)", i, h->op,
                                         (unsigned long long)h->sequence));
    if (h->agreed != t->out.agreed)
        return fail_for_all(
            c, comm_fail(&c->base, ERR_INTERNAL, m->op, "rank %d called it with other sizes or another root", i));
    if (h->bytes != m->in[i].bytes)
        return fail_for_all(c,
                            comm_fail(&c->base, ERR_INTERNAL, m->op, "rank %d sends %lld bytes where %lld are expected",
                                      i, (long long)h->bytes, (long long)m->in[i].bytes));
    return 0;
}

// What of a header and the bytes behind it is still to come or go.
static int rest(void *header, size_t header_bytes, const uint8_t *bytes, int64_t n, int64_t done, struct iovec out[2])
{
    int parts = 0;
    const int64_t head = (int64_t)header_bytes;
    if (done < head)
        out[parts++] = (struct iovec){(char *)header + done, (size_t)(head - done)};
    const int64_t at = done > head ? done - head : 0;
    if (at < n)
        out[parts++] = (struct iovec){(uint8_t *)bytes + at, (size_t)(n - at)};
    return parts;
}

static bool would_block(ssize_t n)
{
    return n < 0 && (errno == EAGAIN || errno == EINTR);
}

// Sends what the other side takes now. *moved: it took something.
static int speak(struct tcp_comm *c, const struct message *m, struct talk *t, int i, bool *moved)
{
    struct iovec parts[2];
    while (t->sent < out_bytes(t)) {
        struct msghdr message = {.msg_iov = parts};
        message.msg_iovlen = (size_t)rest(&t->out, sizeof t->out, t->piece.from, t->piece.bytes, t->sent, parts);
        const ssize_t n = sendmsg(t->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (would_block(n))
            return 0;
        if (n <= 0)
            return fail_gone(c, m->op, i);
        t->sent += n;
        *moved = true;
    }
    return 0;
}

// Takes what has come. The header is judged before a byte behind it is.
static int listen_to(struct tcp_comm *c, const struct message *m, struct talk *t, int i, bool *moved)
{
    while (!heard(t) || t->got < in_bytes(t)) {
        const int64_t head = (int64_t)sizeof t->in;
        char *to = heard(t) ? (char *)t->to + (t->got - head) : (char *)&t->in + t->got;
        const ssize_t n = recv(t->fd, to, (size_t)((heard(t) ? in_bytes(t) : head) - t->got), MSG_DONTWAIT);
        if (would_block(n))
            return 0;
        if (n <= 0)
            return fail_gone(c, m->op, i);
        const bool before = heard(t);
        t->got += n;
        *moved = true;
        if (!before && heard(t))
            TRY(check_header(c, m, t, i));
    }
    return 0;
}

static int fail_slow(struct tcp_comm *c, const struct message *m, const struct talk *talks)
{
    uint64_t missing = 0, slow = 0;
    for (int i = 0; i < c->base.size; i++)
        if (i != c->base.rank && !is_over(&talks[i])) {
            missing |= heard(&talks[i]) ? 0 : rank_bit(c->members[i]);
            slow |= rank_bit(c->members[i]);
        }
    return comm_fail_late(&c->base, m->op, missing ? "arrive" : "take or send all", missing ? missing : slow);
}

// Sleeps until something can go on. Time while others have not come counts as waiting.
static int sleep_until_ready(struct tcp_comm *c, const struct message *m, const struct talk *talks)
{
    struct pollfd fds[COMM_MAX_RANKS + 1] = {{.fd = c->world->stopped, .events = POLLIN}};
    const int timeout_ms = c->base.root->timeout_ms;
    const double began = monotonic_seconds();
    bool all_came = true;
    int n = 1;
    for (int i = 0; i < c->base.size; i++) {
        const struct talk *t = &talks[i];
        if (i == c->base.rank || is_over(t))
            continue;
        all_came = all_came && heard(t);
        fds[n++] = (struct pollfd){.fd = t->fd,
                                   .events = (short)((t->sent < out_bytes(t) ? POLLOUT : 0) |
                                                     (t->got < in_bytes(t) || !heard(t) ? POLLIN : 0))};
    }
    int ready = 0;
    do
        ready = poll(fds, (nfds_t)n, timeout_ms > 0 ? timeout_ms : -1);
    while (ready < 0 && errno == EINTR);
    if (!all_came)
        c->base.root->waiting += monotonic_seconds() - began;
    if (comm_aborted(&c->base))
        return comm_fail_aborted(&c->base);
    return ready == 0 ? fail_slow(c, m, talks) : 0;
}

static void begin_talks(struct tcp_comm *c, const struct message *m, struct talk *talks)
{
    const bool alike = m->op != COMM_ALL_TO_ALL;
    const uint64_t agreed = alike ? digest(m->op, m->counts, m->n_counts) : 0;
    for (int i = 0; i < c->base.size; i++) {
        struct talk *t = &talks[i];
        if (i == c->base.rank)
            continue;
        *t = (struct talk){.fd = c->world->fd[CHANNEL_MESSAGES][c->members[i]],
                           .piece = message_piece_for(m, &c->base, i)};
        t->to = m->in[i].to;
        t->out = (struct header){HEADER_MAGIC, m->op, c->group, c->base.sequence, t->piece.bytes, agreed};
    }
}

static int tcp_move(struct comm *base, const struct message *m)
{
    struct tcp_comm *c = (struct tcp_comm *)base;
    struct talk talks[COMM_MAX_RANKS] = {0};
    begin_talks(c, m, talks);
    for (;;) {
        bool moved = false, over = true;
        for (int step = 1; step < base->size; step++) { // each begins with another
            const int i = (base->rank + step) % base->size;
            struct talk *t = &talks[i];
            TRY(speak(c, m, t, i, &moved));
            TRY(listen_to(c, m, t, i, &moved));
            over = over && is_over(t);
        }
        if (over)
            return 0;
        if (!moved)
            TRY(sleep_until_ready(c, m, talks));
    }
}

// ---- groups, and the end

static int tcp_group(struct comm *base, int first, int stride, int count, struct comm **out, struct err *err)
{
    const struct tcp_comm *c = (struct tcp_comm *)base;
    const int64_t shape[] = {first, stride, count};
    struct tcp_comm *g = calloc(1, sizeof *g);
    if (!g)
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    comm_init(&g->base, base->ops, (base->rank - first) / stride, count, NULL);
    g->base.root = base->root;
    g->base.parent = base;
    g->world = c->world;
    g->group = digest(c->group, shape, 3);
    for (int i = 0; i < count; i++)
        g->members[i] = c->members[first + i * stride];
    const int64_t none = 0;
    const struct message meet = {.op = COMM_GROUP, .counts = &none, .n_counts = 1};
    if (count > 1 && tcp_move(&g->base, &meet) != 0) {
        free(g);
        return comm_check(base, err);
    }
    *out = &g->base;
    return 0;
}

static void raise_event(int fd)
{
    const uint64_t one = 1;
    const ssize_t ignored = write(fd, &one, sizeof one); // full means readable already
    (void)ignored;
}

// An alarm always fits: there is at most one a rank.
static void send_alarms(const struct tcp_world *w, const char *reason)
{
    struct alarm a = {.reason = ""};
    snprintf(a.reason, sizeof a.reason, "%s", reason);
    for (int r = 0; r < w->size; r++)
        if (w->fd[CHANNEL_ALARMS][r] >= 0)
            send(w->fd[CHANNEL_ALARMS][r], &a, sizeof a, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void tcp_wake(struct comm *base)
{
    struct tcp_world *w = ((struct tcp_comm *)base)->world;
    const char *reason = w->note.reason[atomic_load(&w->note.chosen) - 1];
    raise_event(w->stopped);
    if (!atomic_exchange(&w->told, true))
        send_alarms(w, *reason ? reason : "no reason kept");
}

static void free_world(struct tcp_world *w)
{
    if (w->watched) {
        raise_event(w->leaving);
        pthread_join(w->watcher, NULL);
    }
    if (!atomic_exchange(&w->told, true))
        send_alarms(w, "");
    for (int channel = 0; channel < CHANNELS; channel++)
        for (int r = 0; r < w->size; r++)
            if (w->fd[channel][r] >= 0)
                close(w->fd[channel][r]);
    if (w->stopped >= 0)
        close(w->stopped);
    if (w->leaving >= 0)
        close(w->leaving);
    free(w);
}

static void tcp_free(struct comm *base)
{
    if (base->parent == NULL)
        free_world(((struct tcp_comm *)base)->world);
    free(base);
}

static const struct comm_ops tcp_ops = {
    .all_to_all = message_all_to_all,
    .all_gather = message_all_gather,
    .broadcast = message_broadcast,
    .barrier = message_barrier,
    .move = tcp_move,
    .group = tcp_group,
    .wake = tcp_wake,
    .free = tcp_free,
};

// ---- the watcher

// Whether rank r's alarms are over: it said goodbye, gave a reason, or went without a word.
static bool take_alarm(struct tcp_world *w, int r, struct alarm *a, size_t *got)
{
    char text[sizeof a->reason];
    const ssize_t n = recv(w->fd[CHANNEL_ALARMS][r], (char *)a + *got, sizeof *a - *got, MSG_DONTWAIT);
    if (would_block(n))
        return false;
    *got += n > 0 ? (size_t)n : 0;
    if (n > 0 && *got < sizeof *a)
        return false;
    if (n > 0) {
        a->reason[sizeof a->reason - 1] = '\0';
        if (*a->reason)
            comm_abort(w->root, a->reason);
        return true;
    }
    snprintf(text, sizeof text, "rank %d ended, or the way to its host did (%s)", r,
             n == 0 ? "its connection was closed" : strerror(errno));
    comm_abort(w->root, text);
    return true;
}

static void *watch(void *arg)
{
    struct tcp_world *w = arg;
    struct alarm alarms[COMM_MAX_RANKS];
    size_t got[COMM_MAX_RANKS] = {0};
    struct pollfd fds[COMM_MAX_RANKS + 1];
    for (int r = 0; r < w->size; r++)
        fds[r] = (struct pollfd){.fd = w->fd[CHANNEL_ALARMS][r], .events = POLLIN};
    fds[w->size] = (struct pollfd){.fd = w->leaving, .events = POLLIN};
    for (;;) {
        if (poll(fds, (nfds_t)w->size + 1, -1) < 0)
            continue;
        if (fds[w->size].revents)
            return NULL;
        for (int r = 0; r < w->size; r++)
            if (fds[r].revents && take_alarm(w, r, &alarms[r], &got[r]))
                fds[r].fd = -1;
    }
}

// ---- meeting

// "10.0.0.1:4000", "[fe80::1]:4000" and back.
static void write_place(const struct sockaddr_storage *a, char out[COMM_TCP_PLACE])
{
    char host[INET6_ADDRSTRLEN] = "";
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)a;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)a;
    const bool ipv6 = a->ss_family == AF_INET6;
    inet_ntop(a->ss_family, ipv6 ? (const void *)&v6->sin6_addr : (const void *)&v4->sin_addr, host, sizeof host);
    snprintf(out, COMM_TCP_PLACE, ipv6 ? "[%s]:%u" : "%s:%u", host, ntohs(ipv6 ? v6->sin6_port : v4->sin_port));
}

static bool read_place(const char *place, struct sockaddr_storage *out, socklen_t *n)
{
    char host[INET6_ADDRSTRLEN + 2] = "";
    const char *colon = strrchr(place, ':');
    const bool ipv6 = *place == '[';
    struct sockaddr_in *v4 = (struct sockaddr_in *)out;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
    char *end = NULL;
    const long port = colon ? strtol(colon + 1, &end, 10) : -1;
    *out = (struct sockaddr_storage){0};
    if (port < 0 || port > 65535 || end == colon + 1 || *end || (ipv6 && colon[-1] != ']'))
        return false;
    snprintf(host, sizeof host, "%.*s", (int)(colon - place) - 2 * ipv6, place + ipv6);
    out->ss_family = ipv6 ? AF_INET6 : AF_INET;
    *(ipv6 ? &v6->sin6_port : &v4->sin_port) = htons((uint16_t)port);
    *n = ipv6 ? sizeof *v6 : sizeof *v4;
    return inet_pton(out->ss_family, host, ipv6 ? (void *)&v6->sin6_addr : (void *)&v4->sin_addr) == 1;
}

int comm_tcp_listen(const char *address, char place[COMM_TCP_PLACE], struct err *err)
{
    char text[COMM_TCP_PLACE];
    struct sockaddr_storage at;
    socklen_t n = 0;
    snprintf(text, sizeof text, strchr(address, ':') ? "[%.46s]:0" : "%.46s:0", address);
    if (!read_place(text, &at, &n)) {
        err_set(err, ERR_INVALID, "%.46s is no IPv4 or IPv6 address", address);
        return -1;
    }
    const int fd = socket(at.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, n) != 0 || listen(fd, CHANNELS * COMM_MAX_RANKS) != 0 ||
        getsockname(fd, (struct sockaddr *)&at, &n) != 0) {
        err_set(err, ERR_IO, "cannot listen on %.46s: %s%s", address, strerror(errno),
                errno == EADDRNOTAVAIL ? "; it is no address of this machine" : "");
        if (fd >= 0)
            close(fd);
        return -1;
    }
    write_place(&at, place);
    return fd;
}

static int left_ms(double until)
{
    const double left = until - monotonic_seconds();
    return left > 0 ? (int)(left * 1e3) + 1 : 0;
}

static void set_options(int fd, int channel)
{
    const int on = 1, idle = KEEP_IDLE, every = KEEP_EVERY, times = KEEP_TIMES;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (channel != CHANNEL_ALARMS)
        return;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every, sizeof every);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
}

static struct hello hello_of(const struct comm_tcp_meeting *where, int rank, int channel)
{
    struct hello h = {HELLO_MAGIC, TCP_VERSION, (uint32_t)where->size, (uint32_t)rank, (uint32_t)channel, ""};
    memcpy(h.secret, where->secret, sizeof h.secret);
    return h;
}

// Connects, and says who is there. The other's answer is read later: it may not run yet.
static int call(const struct comm_tcp_meeting *where, int rank, int other, int channel, double until, int *out,
                struct err *err)
{
    struct sockaddr_storage at;
    socklen_t n = 0;
    const struct hello h = hello_of(where, rank, channel);
    if (!read_place(where->places[other], &at, &n))
        return err_set(err, ERR_INVALID, "rank %d is said to be at \"%.60s\", which is no place", other,
                       where->places[other]);
    const int fd = *out = socket(at.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int failed = fd < 0 ? errno : connect(fd, (struct sockaddr *)&at, n) == 0 ? 0 : errno;
    if (failed == EINPROGRESS) {
        struct pollfd p = {.fd = fd, .events = POLLOUT};
        socklen_t size = sizeof failed;
        failed = ETIMEDOUT;
        if (poll(&p, 1, left_ms(until)) > 0)
            getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &size);
    }
    if (failed == 0 && send(fd, &h, sizeof h, MSG_NOSIGNAL) != (ssize_t)sizeof h)
        failed = errno;
    if (failed != 0)
        return err_set(err, ERR_UNAVAILABLE, "rank %d, at %s, cannot be reached: %s", other, where->places[other],
                       strerror(failed));
    set_options(fd, channel);
    return 0;
}

// A caller that has not said yet who it is.
struct stranger {
    int fd;
    double until; // then its place may be another's
    size_t got;
    struct hello hello;
};

static bool same_secret(const char *a, const char *b)
{
    unsigned char differs = 0;
    for (size_t i = 0; i < COMM_TCP_SECRET; i++)
        differs |= (unsigned char)(a[i] ^ b[i]);
    return differs == 0;
}

// Whether the caller has said all; then it is one of us, or gone.
static bool meet_stranger(struct tcp_world *w, const struct comm_tcp_meeting *where, struct stranger *s, int *missing)
{
    const ssize_t n = recv(s->fd, (char *)&s->hello + s->got, sizeof s->hello - s->got, MSG_DONTWAIT);
    if (would_block(n))
        return false;
    s->got += n > 0 ? (size_t)n : 0;
    if (n > 0 && s->got < sizeof s->hello)
        return false;
    const struct hello *h = &s->hello;
    const struct hello mine = hello_of(where, w->rank, (int)h->channel);
    const bool ours = n > 0 && h->magic == HELLO_MAGIC && h->version == TCP_VERSION && h->size == (uint32_t)w->size &&
                      h->rank > (uint32_t)w->rank && h->rank < (uint32_t)w->size && h->channel < CHANNELS &&
                      same_secret(h->secret, where->secret) && w->fd[h->channel][h->rank] < 0;
    if (!ours || send(s->fd, &mine, sizeof mine, MSG_NOSIGNAL) != (ssize_t)sizeof mine) {
        close(s->fd);
        return true;
    }
    w->fd[h->channel][h->rank] = s->fd;
    set_options(s->fd, (int)h->channel);
    --*missing;
    return true;
}

static int fail_absent(const struct tcp_world *w, const struct comm_tcp_meeting *where, struct err *err)
{
    for (int r = 0; r < w->size; r++)
        for (int channel = 0; channel < CHANNELS; channel++)
            if (r > w->rank && w->fd[channel][r] < 0)
                return err_set(err, ERR_TIMEOUT, "rank %d, of %s, did not come", r, where->places[r]);
    return err_set(err, ERR_INTERNAL, "nobody is missing");
}

// Where there are as many strangers as can be heard: closes the one that came first, once it had its time. Returns the
// milliseconds until then, or -1: there is room.
static int make_room(struct stranger *strangers, int *n)
{
    int first = 0;
    if (*n < STRANGERS)
        return -1;
    for (int i = 1; i < *n; i++)
        if (strangers[i].until < strangers[first].until)
            first = i;
    const int left = left_ms(strangers[first].until);
    if (left > 0)
        return left;
    close(strangers[first].fd);
    strangers[first] = strangers[--*n];
    return -1;
}

// Ranks above call.
static int receive_callers(struct tcp_world *w, const struct comm_tcp_meeting *where, int listener, double until,
                           struct err *err)
{
    struct stranger strangers[STRANGERS];
    int n = 0, missing = CHANNELS * (w->size - 1 - w->rank), rc = 0;
    while (missing > 0 && rc == 0) {
        const int full = make_room(strangers, &n), left = left_ms(until);
        struct pollfd fds[STRANGERS + 1] = {{.fd = full < 0 ? listener : -1, .events = POLLIN}};
        for (int i = 0; i < n; i++)
            fds[i + 1] = (struct pollfd){.fd = strangers[i].fd, .events = POLLIN};
        if (left == 0) {
            rc = fail_absent(w, where, err);
            break;
        }
        if (poll(fds, (nfds_t)n + 1, full >= 0 && full < left ? full : left) <= 0)
            continue;
        for (int i = n - 1; i >= 0; i--)
            if (fds[i + 1].revents && meet_stranger(w, where, &strangers[i], &missing))
                strangers[i] = strangers[--n];
        const int fd = fds[0].revents ? accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;
        if (fd >= 0)
            strangers[n++] = (struct stranger){.fd = fd, .until = monotonic_seconds() + HEARING_MS * 1e-3};
    }
    while (n > 0)
        close(strangers[--n].fd);
    return rc;
}

// The answer of a rank below: it runs, and is of this meeting.
static int await_answer(const struct tcp_world *w, const struct comm_tcp_meeting *where, int other, int channel,
                        double until, struct err *err)
{
    struct hello h = {0};
    const int fd = w->fd[channel][other];
    struct pollfd p = {.fd = fd, .events = POLLIN};
    for (size_t got = 0; got < sizeof h;) {
        const int left = left_ms(until);
        if (left == 0 || poll(&p, 1, left) == 0)
            return err_set(err, ERR_TIMEOUT, "rank %d, at %s, did not answer", other, where->places[other]);
        const ssize_t n = recv(fd, (char *)&h + got, sizeof h - got, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && !would_block(n)))
            return err_set(err, ERR_UNAVAILABLE, "rank %d, at %s, hung up: it ended, or is of another group or version",
                           other, where->places[other]);
        got += n > 0 ? (size_t)n : 0;
    }
    if (h.magic != HELLO_MAGIC || h.version != TCP_VERSION || h.rank != (uint32_t)other ||
        !same_secret(h.secret, where->secret))
        return err_set(err, ERR_UNAVAILABLE, "who answers at %s is not rank %d of this group", where->places[other],
                       other);
    return 0;
}

// Calls the ranks below, is called by those above. Everybody's listener was there before anybody began.
static int meet_all(struct tcp_world *w, const struct comm_tcp_meeting *where, int listener, int timeout_ms,
                    struct err *err)
{
    const double until = monotonic_seconds() + timeout_ms * 1e-3;
    for (int r = 0; r < w->rank; r++)
        for (int channel = 0; channel < CHANNELS; channel++)
            TRY(call(where, w->rank, r, channel, until, &w->fd[channel][r], err));
    TRY(receive_callers(w, where, listener, until, err));
    for (int r = 0; r < w->rank; r++)
        for (int channel = 0; channel < CHANNELS; channel++)
            TRY(await_answer(w, where, r, channel, until, err));
    return 0;
}

static int open_world(struct tcp_comm *c, const struct comm_tcp_meeting *where, int listener, int rank, int timeout_ms,
                      struct err *err)
{
    struct tcp_world *w = c->world;
    *w = (struct tcp_world){.rank = rank, .size = where->size, .root = &c->base};
    w->stopped = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    w->leaving = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (int channel = 0; channel < CHANNELS; channel++)
        for (int r = 0; r < COMM_MAX_RANKS; r++)
            w->fd[channel][r] = -1;
    comm_init(&c->base, &tcp_ops, rank, where->size, &w->note);
    for (int i = 0; i < where->size; i++)
        c->members[i] = (uint8_t)i;
    if (w->stopped < 0 || w->leaving < 0)
        return err_set(err, ERR_NO_MEMORY, "no descriptor for a communicator: %s", strerror(errno));
    TRY(meet_all(w, where, listener, timeout_ms, err));
    w->watched = pthread_create(&w->watcher, NULL, watch, w) == 0;
    return w->watched ? 0 : err_set(err, ERR_NO_MEMORY, "no thread to watch a communicator");
}

int comm_tcp_join(const struct comm_tcp_meeting *where, int listener, int rank, int timeout_ms, struct comm **out,
                  struct err *err)
{
    *out = NULL;
    if (where->size < 1 || where->size > COMM_MAX_RANKS || rank < 0 || rank >= where->size)
        return err_set(err, ERR_INVALID, "rank %d of %d: 1 to %d ranks, which count from 0", rank, where->size,
                       COMM_MAX_RANKS);
    struct tcp_comm *c = calloc(1, sizeof *c);
    struct tcp_world *w = calloc(1, sizeof *w);
    if (!c || !w) {
        free(c);
        free(w);
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    }
    c->world = w;
    const int rc = open_world(c, where, listener, rank, timeout_ms, err);
    if (rc != 0)
        tcp_free(&c->base);
    else
        *out = &c->base;
    return rc;
}
