// test_comm.c: ranks as forked processes and as threads, over shared memory and over TCP, exchange bytes whose value
// every rank can compute; then they stall, disagree, abort and die. Threads of shared memory have one mapping, so a
// race detector sees them.
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "worker/comm/comm_internal.h"

// In a rank cmocka's asserts do not work: say where and return non-zero.
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void sleep_ms(int ms)
{
    poll(NULL, 0, ms);
}

static uint64_t mix(uint64_t x) // splitmix64
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

// ---- running ranks

typedef int (*rank_fn)(struct comm *c, const void *arg);

// Ranks that do not come stay until those that miss them are done: over TCP they would be known to have left.
static atomic_int *done; // shared with processes

enum way { SHM, SHM_THREADS, TCP, TCP_THREADS, WAYS };

struct crew {
    bool threads, tcp;
    int size, fd;
    struct comm_tcp_meeting where;
    int listeners[COMM_MAX_RANKS];
    rank_fn fn;
    const void *arg;
    void *region; // threads
    int64_t bytes;
    struct rank {
        struct crew *crew;
        int rank, result;
        pthread_t thread;
        pid_t pid;
    } ranks[COMM_MAX_RANKS];
};

static int run_rank(struct rank *r)
{
    struct crew *w = r->crew;
    struct comm *c = NULL;
    struct err err = {0};
    int code = w->tcp       ? comm_tcp_join(&w->where, w->listeners[r->rank], r->rank, 20000, &c, &err)
               : w->threads ? comm_shm_attach_mapped(w->region, w->bytes, r->rank, &c, &err)
                            : comm_shm_attach(w->fd, r->rank, &c, &err);
    if (code != 0) {
        fprintf(stderr, "rank %d: %s\n", r->rank, err.text);
        return 1;
    }
    int result = w->fn(c, w->arg);
    if (result != 0 && comm_check(c, &err) != 0)
        fprintf(stderr, "rank %d: %s\n", r->rank, err.text);
    comm_free(c);
    return result;
}

static void *thread_main(void *arg)
{
    struct rank *r = arg;
    r->result = run_rank(r);
    return NULL;
}

static void open_region(struct crew *w, int64_t slab)
{
    struct err err = {0};
    struct stat st;
    w->fd = comm_shm_region(w->size, slab, &err);
    assert_true(w->fd >= 0);
    if (!w->threads)
        return;
    assert_int_equal(fstat(w->fd, &st), 0);
    w->bytes = st.st_size;
    w->region = mmap(NULL, (size_t)w->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, w->fd, 0);
    assert_true(w->region != MAP_FAILED);
}

// Odd ranks are at ::1, where the host has it.
static void listen_all(struct crew *w)
{
    struct err err = {0};
    w->fd = -1;
    w->where = (struct comm_tcp_meeting){.size = w->size, .secret = "between us"};
    for (int r = 0; r < w->size; r++) {
        w->listeners[r] = r % 2 ? comm_tcp_listen("::1", w->where.places[r], &err) : -1;
        if (w->listeners[r] < 0)
            w->listeners[r] = comm_tcp_listen("127.0.0.1", w->where.places[r], &err);
        assert_true(w->listeners[r] >= 0);
    }
}

static void start_ranks(struct crew *w)
{
    for (int i = 0; i < w->size; i++) {
        struct rank *r = &w->ranks[i];
        r->crew = w;
        r->rank = i;
        if (w->threads) {
            assert_int_equal(pthread_create(&r->thread, NULL, thread_main, r), 0);
        } else if ((r->pid = fork()) == 0) {
            _exit(run_rank(r));
        }
    }
}

static void start(struct crew *w, enum way way, int size, int64_t slab, rank_fn fn, const void *arg)
{
    const bool threads = way == SHM_THREADS || way == TCP_THREADS;
    *w = (struct crew){.threads = threads, .tcp = way >= TCP, .size = size, .fn = fn, .arg = arg};
    if (w->tcp)
        listen_all(w);
    else
        open_region(w, slab);
    start_ranks(w);
}

// How many ranks did not return 0.
static int finish(struct crew *w)
{
    int failed = 0;
    for (int i = 0; i < w->size; i++) {
        struct rank *r = &w->ranks[i];
        int status = 0;
        if (w->threads) {
            pthread_join(r->thread, NULL);
            failed += r->result != 0;
        } else {
            while (waitpid(r->pid, &status, 0) < 0 && errno == EINTR)
                ;
            failed += status != 0;
        }
    }
    if (w->region)
        munmap(w->region, (size_t)w->bytes);
    for (int i = 0; w->tcp && i < w->size; i++)
        close(w->listeners[i]);
    if (w->fd >= 0)
        close(w->fd);
    return failed;
}

static int run_ranks(enum way way, int size, int64_t slab, rank_fn fn, const void *arg)
{
    struct crew w;
    atomic_store(done, 0);
    start(&w, way, size, slab, fn, arg);
    return finish(&w);
}

// ---- right bytes

struct traffic {
    uint64_t seed;
    int rounds;
    int64_t longest; // of one piece, bytes
};

static uint8_t byte_at(uint64_t key, int from, int to, int64_t i)
{
    return (uint8_t)((mix(key + (uint64_t)(from * 64 + to)) >> 8) + (uint64_t)i * 7);
}

// A third of the pieces is empty, a third short.
static int64_t piece_bytes(const struct traffic *t, uint64_t key, int from, int to)
{
    uint64_t h = mix(mix(key) + (uint64_t)(from * 64 + to));
    return h % 3 == 0 ? 0 : (int64_t)((h >> 8) % (uint64_t)(h % 3 == 1 ? 9 : t->longest + 1));
}

static void fill(uint8_t *to, uint64_t key, int from, int dest, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = byte_at(key, from, dest, i);
}

static bool holds(const uint8_t *p, uint64_t key, int from, int dest, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (p[i] != byte_at(key, from, dest, i))
            return false;
    return true;
}

static int one_all_to_all(struct comm *c, const struct traffic *t, uint64_t key, uint8_t *a, uint8_t *b)
{
    int n = comm_size(c), me = comm_rank(c);
    int64_t sc[COMM_MAX_RANKS], so[COMM_MAX_RANKS], rc[COMM_MAX_RANKS], ro[COMM_MAX_RANKS], at = 0, end = 0;
    for (int r = n - 1; r >= 0; r--) { // offsets in no particular order
        sc[r] = piece_bytes(t, key, me, r);
        rc[r] = piece_bytes(t, key, r, me);
        so[r] = at;
        ro[r] = end + 1; // a byte between pieces, which nobody may touch
        at += sc[r];
        end += rc[r] + 1;
        fill(a + so[r], key, me, r, sc[r]);
    }
    memset(b, 0xee, (size_t)end + 1);
    comm_all_to_all(c, a, sc, so, b, rc, ro);
    CHECK(comm_check(c, NULL) == 0);
    for (int r = 0; r < n; r++) {
        CHECK(holds(b + ro[r], key, r, me, rc[r]));
        CHECK(b[ro[r] - 1] == 0xee && b[ro[r] + rc[r]] == 0xee);
    }
    return 0;
}

static int one_all_gather(struct comm *c, const struct traffic *t, uint64_t key, uint8_t *a, uint8_t *b)
{
    int n = comm_size(c), me = comm_rank(c);
    int64_t counts[COMM_MAX_RANKS], end = 0, mine = 0;
    for (int r = 0; r < n; r++) {
        counts[r] = piece_bytes(t, key, r, 0);
        mine = r == me ? end : mine;
        end += counts[r];
    }
    bool in_place = key % 2 == 0;
    fill(in_place ? b + mine : a, key, me, 0, counts[me]);
    comm_all_gather(c, in_place ? b + mine : a, b, counts);
    CHECK(comm_check(c, NULL) == 0);
    int64_t at = 0;
    for (int r = 0; r < n; at += counts[r++])
        CHECK(holds(b + at, key, r, 0, counts[r]));
    return 0;
}

static int one_broadcast(struct comm *c, const struct traffic *t, uint64_t key, uint8_t *a)
{
    int root = (int)(key % (uint64_t)comm_size(c));
    int64_t bytes = piece_bytes(t, key, root, 0);
    memset(a, 0, (size_t)bytes);
    if (comm_rank(c) == root)
        fill(a, key, root, 0, bytes);
    comm_broadcast(c, a, bytes, root);
    CHECK(comm_check(c, NULL) == 0);
    CHECK(holds(a, key, root, 0, bytes));
    return 0;
}

// Only the byte after the piece is watched: pieces begin where the buffer does.
static int one_shift(struct comm *c, const struct traffic *t, uint64_t key, uint8_t *a, uint8_t *b)
{
    int n = comm_size(c), me = comm_rank(c), next = (me + 1) % n, before = (me + n - 1) % n;
    int64_t out = piece_bytes(t, key, me, next), in = piece_bytes(t, key, before, me);
    fill(a, key, me, next, out);
    memset(b, 0xee, (size_t)in + 1);
    comm_shift(c, out ? a : NULL, out, in ? b : NULL, in);
    CHECK(comm_check(c, NULL) == 0);
    CHECK(holds(b, key, before, me, in) && b[in] == 0xee);
    return 0;
}

static int traffic_rank(struct comm *c, const void *arg)
{
    const struct traffic *t = arg;
    size_t room = (size_t)comm_size(c) * ((size_t)t->longest + 1) + 1;
    uint8_t *a = malloc(room), *b = malloc(room);
    int failed = a == NULL || b == NULL;
    for (int i = 0; i < t->rounds && !failed; i++) {
        uint64_t key = mix(t->seed + (uint64_t)i);
        switch (i % 5) {
        case 0:
        case 1:
            failed = one_all_to_all(c, t, key, a, b);
            break;
        case 2:
            failed = one_all_gather(c, t, key, a, b);
            break;
        case 3:
            failed = one_shift(c, t, key, a, b);
            break;
        default:
            failed = one_broadcast(c, t, key, a);
            comm_barrier(c);
        }
    }
    free(a);
    free(b);
    return failed;
}

static void traffic_is_delivered(void **state)
{
    (void)state;
    const int sizes[] = {1, 2, 3, 4, 6, 8};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct traffic roomy = {.seed = 100 + i, .rounds = 120, .longest = 3000};
        struct traffic tight = {.seed = 200 + i, .rounds = 40, .longest = 1000};
        for (enum way way = SHM; way < WAYS; way++) {
            assert_int_equal(run_ranks(way, sizes[i], 65536, traffic_rank, &roomy), 0);
            assert_int_equal(run_ranks(way, sizes[i], 300, traffic_rank, &tight), 0);
        }
    }
}

static void long_messages_go_in_pieces(void **state)
{
    (void)state;
    struct traffic t = {.seed = 7, .rounds = 16, .longest = 300000};
    for (enum way way = SHM; way < WAYS; way++)
        assert_int_equal(run_ranks(way, 3, 4096, traffic_rank, &t), 0);
}

// ---- groups

static int group_total(struct comm *g, int64_t mine, int64_t expected)
{
    int64_t all[COMM_MAX_RANKS], counts[COMM_MAX_RANKS], total = 0;
    for (int r = 0; r < comm_size(g); r++)
        counts[r] = sizeof mine;
    comm_all_gather(g, &mine, all, counts);
    CHECK(comm_check(g, NULL) == 0);
    for (int r = 0; r < comm_size(g); r++)
        total += all[r];
    CHECK(total == expected);
    return 0;
}

// Each turn makes three: halves of the four ranks, a pair or a single within the half, odd and even ranks. Ranks free
// them turns later than their leaders do, each at another time.
static int groups_rank(struct comm *c, const void *arg)
{
    enum { LATE = 8 };
    int turns = *(const int *)arg, me = comm_rank(c);
    struct comm *held[LATE][3] = {0};
    int late = 1 + (me * 5) % LATE;
    for (int i = 0; i < turns; i++) {
        struct comm **g = held[i % late];
        for (int k = 2; k >= 0; k--)
            comm_free(g[k]);
        int half = me / 2 * 2, other = me % 2;
        CHECK(comm_group(c, half, 1, 2, &g[0], NULL) == 0);
        CHECK(comm_rank(g[0]) == me - half && comm_size(g[0]) == 2);
        if (i % 3 == 0)
            CHECK(comm_group(g[0], other, 1, 1, &g[1], NULL) == 0);
        else
            CHECK(comm_group(g[0], 0, 1, 2, &g[1], NULL) == 0);
        CHECK(comm_group(c, other, 2, 2, &g[2], NULL) == 0);
        CHECK(comm_rank(g[2]) == me / 2);
        if (i % 16 == 0) {
            CHECK(group_total(g[0], me + i, 2 * half + 1 + 2 * i) == 0);
            CHECK(group_total(g[1], me, i % 3 == 0 ? me : 2 * half + 1) == 0);
            CHECK(group_total(g[2], me, 2 * other + 2) == 0);
            CHECK(group_total(c, me, 6) == 0);
        }
    }
    for (int i = 0; i < late; i++)
        for (int k = 2; k >= 0; k--)
            comm_free(held[i][k]);
    CHECK(group_total(c, me, 6) == 0);
    return 0;
}

// The leader frees at once, the other holds as many as there can be.
static int hoarder_rank(struct comm *c, const void *arg)
{
    int turns = *(const int *)arg;
    struct comm *held[32] = {0};
    for (int i = 0; i < turns; i++) {
        struct comm **g = &held[comm_rank(c) == 0 ? 0 : i % 32];
        if (i % 64 == 63)
            sleep_ms(comm_rank(c)); // let the leader fall asleep over it
        comm_free(*g);
        CHECK(comm_group(c, 0, 1, 2, g, NULL) == 0);
    }
    for (int i = 0; i < 32; i++)
        comm_free(held[i]);
    return 0;
}

static void groups_are_reused(void **state)
{
    (void)state;
    int hoarded = 1000;
    for (enum way way = SHM; way < WAYS; way++)
        assert_int_equal(run_ranks(way, 2, 4096, hoarder_rank, &hoarded), 0);
    int turns = 3400; // 10,200 groups a rank
    assert_int_equal(run_ranks(SHM, 4, 4096, groups_rank, &turns), 0);
    turns = 400;
    assert_int_equal(run_ranks(SHM_THREADS, 4, 4096, groups_rank, &turns), 0);
}

// Uneven traffic in a group of a group, strided, of 8.
static int nested_rank(struct comm *c, const void *arg)
{
    struct comm *odd = NULL, *pair = NULL;
    int me = comm_rank(c);
    CHECK(comm_group(c, me % 2, 2, 4, &odd, NULL) == 0);
    CHECK(comm_group(odd, me / 2 % 2, 2, 2, &pair, NULL) == 0);
    CHECK(comm_rank(pair) == me / 4);
    int failed = traffic_rank(odd, arg) + traffic_rank(pair, arg) + traffic_rank(c, arg);
    CHECK(comm_bytes_sent(c) > comm_bytes_sent(odd) && comm_bytes_sent(odd) > comm_bytes_sent(pair));
    comm_free(pair);
    comm_free(odd);
    return failed;
}

static void groups_nest(void **state)
{
    (void)state;
    struct traffic t = {.seed = 11, .rounds = 24, .longest = 500};
    for (enum way way = SHM; way < WAYS; way++)
        assert_int_equal(run_ranks(way, 8, 1024, nested_rank, &t), 0);
}

static int too_many_rank(struct comm *c, const void *arg)
{
    (void)arg;
    enum { MOST = 32 };
    struct comm *g[MOST + 1] = {0};
    struct err err = {0};
    int code = 0, made = 0;
    while (made <= MOST && (code = comm_group(c, 0, 1, 2, &g[made], &err)) == 0)
        made++;
    CHECK(made == MOST && g[MOST] == NULL);
    CHECK(code == (comm_rank(c) == 0 ? ERR_UNSUPPORTED : ERR_UNAVAILABLE));
    CHECK(strstr(err.text, "32") != NULL);
    while (made > 0)
        comm_free(g[--made]);
    return 0;
}

static int bad_group_rank(struct comm *c, const void *arg)
{
    (void)arg;
    struct comm *g = NULL;
    struct err err = {0};
    const int bad[][3] = {{-1, 1, 1}, {0, 0, 1}, {0, 1, 0}, {0, 1, 4}, {2, 2, 2}, {3, 1, 1}, {0, 1 << 30, 3}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(comm_group(c, bad[i][0], bad[i][1], bad[i][2], &g, &err) == ERR_INVALID && g == NULL);
    CHECK(comm_group(c, (comm_rank(c) + 1) % 3, 1, 1, &g, &err) == ERR_INVALID && strstr(err.text, "none of"));
    CHECK(comm_check(c, NULL) == 0);
    return 0;
}

static void wrong_groups_are_refused(void **state)
{
    (void)state;
    assert_int_equal(run_ranks(SHM, 2, 4096, too_many_rank, NULL), 0);
    assert_int_equal(run_ranks(SHM_THREADS, 3, 4096, bad_group_rank, NULL), 0);
}

// ---- waits that end badly

static int failed_with(struct comm *c, enum err_code code, const char *words)
{
    struct err err = {0};
    comm_check(c, &err);
    if (err.code != code || strstr(err.text, words) == NULL) {
        fprintf(stderr, "rank %d: expected %s with \"%s\", got %s: %s\n", comm_rank(c), err_name(code), words,
                err_name(err.code), err.text);
        return 1;
    }
    double before = now_ms();
    comm_set_timeout(c, 20000);
    comm_barrier(c); // sticky: at once
    CHECK(now_ms() - before < 5000);
    return 0;
}

static int stay_away(int until)
{
    for (double end = now_ms() + 60000; atomic_load(done) < until && now_ms() < end;)
        sleep_ms(1);
    return atomic_load(done) < until;
}

static int missed(int failed)
{
    atomic_fetch_add(done, 1);
    return failed;
}

static int stall_rank(struct comm *c, const void *arg)
{
    (void)arg;
    comm_barrier(c);
    CHECK(comm_check(c, NULL) == 0);
    if (comm_rank(c) % 2 == 1)
        return stay_away(2);
    comm_set_timeout(c, 100);
    double before = now_ms();
    int word = 0;
    comm_broadcast(c, &word, sizeof word, 0);
    double took = now_ms() - before;
    CHECK(took >= 99 && took < 5000);
    return missed(failed_with(c, ERR_TIMEOUT, "broadcast 2 of rank") ||
                  failed_with(c, ERR_TIMEOUT, "missing ranks 1,3 of"));
}

static int group_stall_rank(struct comm *c, const void *arg)
{
    int absent = *(const int *)arg;
    if (comm_rank(c) == absent)
        return stay_away(1);
    comm_set_timeout(c, 80);
    struct comm *g = NULL;
    struct err err = {0};
    CHECK(comm_group(c, 1, 2, 2, &g, &err) == ERR_TIMEOUT && g == NULL);
    char words[64];
    snprintf(words, sizeof words, "missing ranks %d of", absent);
    return missed(failed_with(c, ERR_TIMEOUT, words));
}

static int only_13(struct comm *c, const void *arg)
{
    return comm_rank(c) % 2 == 1 ? group_stall_rank(c, arg) : 0;
}

static void waits_time_out(void **state)
{
    (void)state;
    for (enum way way = SHM; way < WAYS; way++) {
        assert_int_equal(run_ranks(way, 4, 4096, stall_rank, NULL), 0);
        for (int absent = 1; absent < 4; absent += 2)
            assert_int_equal(run_ranks(way, 4, 4096, only_13, &absent), 0);
    }
}

// Rank 1 of 3 does not come. arg: whether somebody says so before the deadline.
static int broken_ring_rank(struct comm *c, const void *arg)
{
    uint8_t in[100], out[100] = {0};
    const bool *told = arg;
    if (comm_rank(c) == 1) {
        if (*told)
            comm_abort(c, "rank 1 fell ill");
        return *told ? 0 : stay_away(2);
    }
    comm_set_timeout(c, *told ? 20000 : 80);
    double before = now_ms();
    comm_shift(c, out, 10 + comm_rank(c), in, comm_rank(c) == 0 ? 12 : 0);
    CHECK(now_ms() - before < 5000);
    return missed(failed_with(c, *told ? ERR_UNAVAILABLE : ERR_TIMEOUT, *told ? "fell ill" : "missing ranks 1 of"));
}

// Rank 1 comes late: the others waited for it, and it for nobody. Then bytes are moved.
static int late_rank(struct comm *c, const void *arg)
{
    enum { BYTES = 1 << 20, LATE_MS = 500 }; // more than a busy machine takes a thread away for
    (void)arg;
    const int64_t counts[3] = {BYTES, BYTES, BYTES};
    uint8_t *all = calloc(3, BYTES);
    struct comm *pair = NULL;
    struct err err = {0};
    if (comm_rank(c) < 2)
        CHECK(comm_group(c, 0, 1, 2, &pair, &err) == 0);
    comm_barrier(c);
    const struct comm_times before = comm_times(c);
    if (comm_rank(c) == 1)
        sleep_ms(LATE_MS);
    comm_barrier(pair ? pair : c); // what groups of a rank do counts as well
    if (pair)
        comm_barrier(c);
    const double waited = comm_times(c).wait - before.wait, moved = comm_times(c).exchange;
    comm_all_gather(c, all + comm_rank(c) * BYTES, all, counts);
    CHECK(comm_rank(c) == 1 ? waited < LATE_MS / 2e3 : waited > LATE_MS / 2e3); // here: nobody waits for this rank
    CHECK(comm_times(c).exchange > moved && comm_check(c, NULL) == 0);
    comm_free(pair);
    free(all);
    return 0;
}

static void waiting_is_told_from_moving(void **state)
{
    (void)state;
    for (enum way way = SHM; way < WAYS; way++)
        assert_int_equal(run_ranks(way, 3, 65536, late_rank, NULL), 0);
}

static void broken_rings_end(void **state)
{
    (void)state;
    for (enum way way = SHM; way < WAYS; way++)
        for (int told = 0; told < 2; told++)
            assert_int_equal(run_ranks(way, 3, 4096, broken_ring_rank, &(const bool){told}), 0);
}

static int until_stopped_rank(struct comm *c, const void *arg)
{
    (void)arg;
    struct comm *pair = NULL;
    CHECK(comm_rank(c) == 2 || comm_group(c, 0, 1, 2, &pair, NULL) == 0);
    while (comm_rank(c) == 2 && comm_check(c, NULL) == 0) // waits for nobody; looks
        sleep_ms(1);
    while (pair != NULL && comm_rank(c) == 1 && comm_check(pair, NULL) == 0) // for a peer who does not come
        comm_barrier(pair);
    if (comm_rank(c) == 0)
        comm_barrier(c);
    CHECK(failed_with(c, ERR_UNAVAILABLE, "stopped: rank 7 was hit by a meteor") == 0);
    comm_free(pair);
    return 0;
}

static void abort_wakes_everybody(void **state)
{
    (void)state;
    for (enum way way = SHM; way <= SHM_THREADS; way++) {
        struct crew w;
        struct comm *watcher = NULL;
        struct err err = {0};
        start(&w, way, 3, 4096, until_stopped_rank, NULL);
        assert_int_equal(way == SHM_THREADS ? comm_shm_attach_mapped(w.region, w.bytes, -1, &watcher, &err)
                                            : comm_shm_attach(w.fd, -1, &watcher, &err),
                         0);
        sleep_ms(60);
        comm_abort(watcher, "rank 7 was hit by a meteor");
        for (int i = 0; i < 6; i++)
            comm_abort(watcher, "a later reason");
        comm_free(watcher);
        assert_int_equal(finish(&w), 0);
    }
}

static void *abort_thread(void *arg)
{
    sleep_ms(30);
    comm_abort(arg, "the lease is lost");
    return NULL;
}

static int abort_own_rank(struct comm *c, const void *arg)
{
    (void)arg;
    if (comm_rank(c) == 1)
        return stay_away(1); // never calls
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, abort_thread, c) == 0);
    comm_barrier(c);
    pthread_join(thread, NULL);
    return missed(failed_with(c, ERR_UNAVAILABLE, "the lease is lost"));
}

static void abort_comes_from_any_thread(void **state)
{
    (void)state;
    for (enum way way = SHM; way < WAYS; way++)
        assert_int_equal(run_ranks(way, 2, 4096, abort_own_rank, NULL), 0);
}

// Works until something fails, then expects it to be this.
static int busy_rank(struct comm *c, const void *arg)
{
    comm_set_timeout(c, 250);
    struct comm *pair = NULL;
    uint8_t *in = calloc(1, 4000), *out = calloc(3, 4000);
    const int64_t counts[3] = {4000, 0, 4000}, pair_counts[2] = {100, 200};
    while (comm_check(c, NULL) == 0) {
        comm_all_gather(c, in, out, counts);
        if (comm_rank(c) > 0 && comm_group(c, 1, 1, 2, &pair, NULL) == 0) {
            comm_all_gather(pair, in, out, pair_counts);
            comm_free(pair);
        }
    }
    free(in);
    free(out);
    struct err err = {0};
    comm_check(c, &err);
    if (strcmp(arg, "timeout") != 0)
        return err.code != ERR_UNAVAILABLE || strstr(err.text, arg) == NULL;
    // Rank 0 may miss rank 1, who waits for rank 2 in the pair.
    return err.code != ERR_TIMEOUT || strstr(err.text, comm_rank(c) == 1 ? "2 of the whole" : "missing ranks") == NULL;
}

static void killed_rank_hangs_nobody(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct crew w;
        struct err err = {0};
        struct comm *watcher = NULL;
        bool tell = i % 2 == 1;
        start(&w, SHM, 3, 1024, busy_rank, tell ? "rank 2 died" : "timeout");
        assert_int_equal(comm_shm_attach(w.fd, -1, &watcher, &err), 0);
        sleep_ms(10 + (int)(mix((uint64_t)i) % 8));
        double killed = now_ms();
        kill(w.ranks[2].pid, SIGKILL);
        if (tell)
            comm_abort(watcher, "rank 2 died");
        comm_free(watcher);
        assert_int_equal(finish(&w), 1);
        assert_true(now_ms() - killed < 5000);
    }
}

// ---- disagreement

static int mismatch_rank(struct comm *c, const void *arg)
{
    int kind = *(const int *)arg, odd = comm_rank(c) == 1;
    uint8_t in[600] = {0}, out[600] = {0};
    int64_t counts[3] = {8, 8, 8}, others[3] = {8, 8, 8}, offsets[3] = {0, 200, 400};
    comm_barrier(c);
    switch (kind) {
    case 0: // another operation
        if (odd)
            comm_broadcast(c, in, 8, 0);
        else
            comm_all_to_all(c, in, counts, offsets, out, counts, offsets);
        break;
    case 1: // another size
        comm_broadcast(c, in, odd ? 16 : 8, 0);
        break;
    case 2: // another root
        comm_broadcast(c, in, 8, odd);
        break;
    case 3: // gather of other counts
        counts[2] += odd;
        comm_all_gather(c, in, out, counts);
        break;
    case 4: // round the ring, rank 0 expects of rank 2 what it does not send
        comm_shift(c, in, 8, out, comm_rank(c) == 0 ? 9 : 8);
        comm_barrier(c);
        break;
    default: // rank 0 expects of rank 1 what it does not send: rank 2 sees nothing wrong but is stopped
        others[1] += comm_rank(c) == 0;
        comm_all_to_all(c, in, counts, offsets, out, others, offsets);
        comm_barrier(c);
    }
    CHECK(out[0] == 0 && out[200] == 0 && out[400] == 0);
    enum err_code code = comm_check(c, NULL);
    if (kind < 4 && code == ERR_UNAVAILABLE) // over TCP another may see it first, and stop this one
        return failed_with(c, code, " called ");
    if (kind < 4 || comm_rank(c) == 0)
        return code != ERR_INTERNAL;
    return code != ERR_UNAVAILABLE || failed_with(c, code,
                                                  kind == 4 ? "rank 2 sends 8 bytes where 9 are expected"
                                                            : "rank 1 sends 8 bytes where 9 are expected");
}

static int bad_counts_rank(struct comm *c, const void *arg)
{
    (void)arg;
    int64_t counts[1] = {-1}, zero[1] = {0}, one[1] = {1};
    uint8_t byte = 0;
    struct comm *self = NULL;
    CHECK(comm_self_new(&self, NULL) == 0);
    comm_all_gather(self, &byte, &byte, counts);
    CHECK(comm_check(self, NULL) == ERR_INTERNAL);
    comm_free(self);
    CHECK(comm_self_new(&self, NULL) == 0);
    comm_all_to_all(self, &byte, zero, zero, &byte, one, zero);
    CHECK(comm_check(self, NULL) == ERR_INTERNAL);
    comm_free(self);
    comm_broadcast(c, &byte, 1, 2);
    return failed_with(c, ERR_INTERNAL, "from rank 2");
}

static void mismatch_is_told(void **state)
{
    (void)state;
    for (enum way way = SHM; way < WAYS; way++) {
        for (int kind = 0; kind < 6; kind++)
            assert_int_equal(run_ranks(way, 3, 4096, mismatch_rank, &kind), 0);
        assert_int_equal(run_ranks(way, 2, 4096, bad_counts_rank, NULL), 0);
    }
}

// ---- TCP: who is gone, who is strange

// Computes, as it were, and hears of the end all the same.
static int thinking_rank(struct comm *c, const void *arg)
{
    (void)arg;
    comm_barrier(c);
    CHECK(comm_check(c, NULL) == 0);
    if (comm_rank(c) == 1) // waits for ever
        comm_barrier(c);
    for (double end = now_ms() + 20000; comm_check(c, NULL) == 0 && now_ms() < end;)
        sleep_ms(1);
    return failed_with(c, ERR_UNAVAILABLE, "rank 2 ended, or the way to its host did");
}

static void a_killed_rank_is_known_to_all(void **state)
{
    (void)state;
    struct crew w;
    start(&w, TCP, 4, 0, thinking_rank, NULL);
    sleep_ms(300);
    const double killed = now_ms();
    kill(w.ranks[2].pid, SIGKILL);
    assert_int_equal(finish(&w), 1);
    assert_true(now_ms() - killed < 2000);
}

static int leaving_rank(struct comm *c, const void *arg)
{
    (void)arg;
    comm_barrier(c);
    if (comm_rank(c) == 2)
        return 0;
    comm_barrier(c);
    return failed_with(c, ERR_UNAVAILABLE, "rank 2 of the whole has left");
}

static void who_leaves_is_not_waited_for(void **state)
{
    (void)state;
    for (enum way way = TCP; way < WAYS; way++)
        assert_int_equal(run_ranks(way, 3, 0, leaving_rank, NULL), 0);
}

static int call_place(const char *place)
{
    const struct addrinfo want = {.ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    char host[COMM_TCP_PLACE];
    const char *colon = strrchr(place, ':');
    const bool ipv6 = *place == '[';
    snprintf(host, sizeof host, "%.*s", (int)(colon - place) - 2 * ipv6, place + ipv6);
    assert_int_equal(getaddrinfo(host, colon + 1, &want, &found), 0);
    const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, found->ai_addr, found->ai_addrlen), 0);
    freeaddrinfo(found);
    return fd;
}

// Callers that say nothing, nonsense, or half of something; a rank of another group; then those that are expected.
static void strangers_are_turned_away(void **state)
{
    (void)state;
    struct traffic t = {.seed = 3, .rounds = 10, .longest = 100};
    struct crew w = {.tcp = true, .size = 2, .fn = traffic_rank, .arg = &t};
    int fds[80];
    uint8_t noise[4096];
    memset(noise, 0x5a, sizeof noise);
    listen_all(&w);
    for (int i = 0; i < 80; i++) {
        fds[i] = call_place(w.where.places[0]);
        if (i >= 40) // those before stay silent
            send(fds[i], noise, i % 2 ? sizeof noise : 10, MSG_NOSIGNAL);
        if (i % 4 == 0) {
            close(fds[i]);
            fds[i] = -1;
        }
    }
    start_ranks(&w);
    assert_int_equal(finish(&w), 0);
    for (int i = 0; i < 80; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

// More callers than can be heard at once, all silent, before those that are expected.
static void silent_callers_give_way(void **state)
{
    enum { SILENT = 100 };
    (void)state;
    struct traffic t = {.seed = 4, .rounds = 10, .longest = 100};
    struct crew w = {.tcp = true, .size = 2, .fn = traffic_rank, .arg = &t};
    int fds[SILENT];
    listen_all(&w);
    for (int i = 0; i < SILENT; i++)
        fds[i] = call_place(w.where.places[0]);
    start_ranks(&w);
    assert_int_equal(finish(&w), 0);
    for (int i = 0; i < SILENT; i++)
        close(fds[i]);
}

struct meeter {
    struct comm_tcp_meeting where;
    int listener, rank, timeout_ms, code;
    struct err err;
    pthread_t thread;
};

static void *meet_alone(void *arg)
{
    struct meeter *m = arg;
    struct comm *c = NULL;
    m->code = comm_tcp_join(&m->where, m->listener, m->rank, m->timeout_ms, &c, &m->err);
    comm_free(c);
    return NULL;
}

// change[r]: rank r was told something else; each has to refuse, or miss, the other.
static void assert_no_meeting(const struct comm_tcp_meeting told[2], const int listeners[2], const char *says0,
                              const char *says1)
{
    struct meeter m[2];
    for (int r = 0; r < 2; r++) {
        m[r] = (struct meeter){.where = told[r], .listener = listeners[r], .rank = r, .timeout_ms = 700};
        assert_int_equal(pthread_create(&m[r].thread, NULL, meet_alone, &m[r]), 0);
    }
    for (int r = 0; r < 2; r++)
        pthread_join(m[r].thread, NULL);
    assert_int_not_equal(m[0].code, 0);
    assert_int_not_equal(m[1].code, 0);
    assert_non_null(strstr(m[0].err.text, says0));
    assert_non_null(strstr(m[1].err.text, says1));
}

static void only_one_group_meets(void **state)
{
    (void)state;
    struct crew w = {.tcp = true, .size = 2};
    struct comm *c = NULL;
    struct err err = {0};
    listen_all(&w);
    struct comm_tcp_meeting told[2] = {w.where, w.where};
    snprintf(told[1].secret, sizeof told[1].secret, "between others");
    assert_no_meeting(told, w.listeners, "did not come", "hung up");
    told[1] = w.where;
    told[1].size = 3; // rank 2 is nowhere
    assert_no_meeting(told, w.listeners, "did not come", "did not come");
    told[1] = w.where;
    snprintf(told[1].places[0], COMM_TCP_PLACE, "127.0.0.1:1");
    assert_no_meeting(told, w.listeners, "rank 1, of", "rank 0, at 127.0.0.1:1, cannot be reached: Connection refused");
    snprintf(told[1].places[0], COMM_TCP_PLACE, "nowhere");
    assert_int_equal(comm_tcp_join(&told[1], w.listeners[1], 1, 100, &c, &err), ERR_INVALID);
    assert_int_equal(comm_tcp_join(&told[0], w.listeners[0], 2, 100, &c, &err), ERR_INVALID);
    for (int r = 0; r < 2; r++)
        close(w.listeners[r]);
    char place[COMM_TCP_PLACE];
    assert_int_equal(comm_tcp_listen("203.0.113.7", place, &err), -1);
    assert_non_null(strstr(err.text, "no address of this machine"));
    assert_int_equal(comm_tcp_listen("gpu1", place, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
}

// ---- attaching

static void assert_refused(int fd, int rank, enum err_code code)
{
    struct comm *c = NULL;
    struct err err = {0};
    assert_int_equal(comm_shm_attach(fd, rank, &c, &err), code);
    assert_null(c);
    assert_true(err.text[0] != 0);
}

static void foreign_descriptors_are_refused(void **state)
{
    (void)state;
    struct err err = {0};
    assert_int_equal(comm_shm_region(0, 4096, &err), -1);
    assert_int_equal(comm_shm_region(COMM_MAX_RANKS + 1, 4096, &err), -1);
    assert_int_equal(comm_shm_region(2, 16, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    int pipes[2], null = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_int_equal(pipe(pipes), 0);
    assert_refused(-1, 0, ERR_CORRUPT);
    assert_refused(null, 0, ERR_CORRUPT);
    assert_refused(pipes[0], 0, ERR_CORRUPT);
    close(null);
    close(pipes[0]);
    close(pipes[1]);
    for (off_t bytes = 0; bytes < 1 << 20; bytes = bytes * 7 + 100) {
        int fd = memfd_create("foreign", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        assert_int_equal(ftruncate(fd, bytes), 0);
        assert_refused(fd, 0, ERR_CORRUPT);
        assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
        assert_refused(fd, 0, ERR_CORRUPT);
        close(fd);
    }
    // Magic, version, ranks, slab and total are the first 32 bytes: whichever is off by a bit, it is refused.
    int fd = comm_shm_region(3, 4096, &err);
    assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    for (int i = 0; i < 32 * 8; i++) {
        uint8_t byte = 0, flipped = 0;
        assert_int_equal(pread(fd, &byte, 1, i / 8), 1);
        flipped = (uint8_t)(byte ^ (1 << i % 8));
        assert_int_equal(pwrite(fd, &flipped, 1, i / 8), 1);
        // a slab that fits the same pages is as good as the true one
        struct comm *c = NULL;
        int code = comm_shm_attach(fd, -1, &c, &err);
        assert_true(code == ERR_CORRUPT || (code == 0 && i >= 16 * 8 && i < 24 * 8));
        comm_free(c);
        assert_int_equal(pwrite(fd, &byte, 1, i / 8), 1);
    }
    assert_refused(fd, 3, ERR_INVALID);
    assert_refused(fd, -2, ERR_INVALID);
    struct comm *c = NULL, *watcher = NULL;
    assert_int_equal(comm_shm_attach(fd, 1, &c, &err), 0);
    assert_refused(fd, 1, ERR_CONFLICT);
    comm_free(c);
    assert_refused(fd, 1, ERR_CONFLICT); // its place in the sequence is gone
    assert_int_equal(comm_shm_attach(fd, -1, &watcher, &err), 0);
    close(fd);
    comm_barrier(watcher);
    assert_int_equal(comm_check(watcher, &err), ERR_INVALID);
    comm_free(watcher);
}

// ---- self and dry

static void self_copies(void **state)
{
    (void)state;
    struct comm *c = NULL, *g = NULL;
    struct err err = {0};
    assert_int_equal(comm_self_new(&c, &err), 0);
    struct traffic t = {.seed = 5, .rounds = 100, .longest = 100};
    assert_int_equal(traffic_rank(c, &t), 0);
    assert_int_equal(comm_group(c, 0, 1, 1, &g, &err), 0);
    assert_int_equal(traffic_rank(g, &t), 0);
    assert_int_equal(comm_bytes_sent(c), 0);
    assert_int_equal(comm_collectives(c), 0);
    comm_abort(g, "enough");
    assert_int_equal(failed_with(c, ERR_UNAVAILABLE, "enough"), 0);
    comm_free(g);
    comm_free(c);
}

static void dry_counts(void **state)
{
    (void)state;
    struct comm *c = NULL, *g = NULL;
    struct err err = {0};
    const int64_t counts[6] = {10, 20, 30, 40, 50, 60}, offsets[6] = {0};
    assert_int_equal(comm_dry_new(6, 6, false, &c, &err), ERR_INVALID);
    assert_int_equal(comm_dry_new(3, 6, false, &c, &err), 0);
    comm_all_to_all(c, NULL, counts, offsets, NULL, counts, offsets);
    assert_int_equal(comm_bytes_sent(c), 210 - 40);
    assert_int_equal(comm_group(c, 1, 2, 3, &g, &err), 0);
    assert_int_equal(comm_rank(g), 1);
    assert_int_equal(comm_size(g), 3);
    comm_all_gather(g, NULL, NULL, counts);
    comm_shift(g, NULL, 11, NULL, 12);
    comm_broadcast(g, NULL, 7, 1);
    comm_broadcast(g, NULL, 7, 0);
    comm_barrier(g);
    assert_int_equal(comm_bytes_sent(g), 2 * 20 + 11 + 2 * 7);
    assert_int_equal(comm_bytes_sent(c), 170 + 65);
    assert_int_equal(comm_collectives(g), 5);
    assert_int_equal(comm_collectives(c), 1 + 5);
    assert_int_equal(comm_check(c, &err), 0);
    comm_free(g);
    comm_free(c);
}

// ---- figures, and nothing left

static int latency_rank(struct comm *c, const void *arg)
{
    enum { TURNS = 4000, BIG = 1 << 20, WIDE = 30 };
    int64_t counts[2] = {64, 64}, offsets[2] = {0, 64}, big[2] = {BIG, BIG};
    uint8_t in[128] = {0}, out[128], *wide = calloc(3, BIG);
    double t0 = now_ms();
    for (int i = 0; i < TURNS; i++)
        comm_barrier(c);
    double t1 = now_ms();
    for (int i = 0; i < TURNS; i++)
        comm_all_to_all(c, in, counts, offsets, out, counts, offsets);
    double t2 = now_ms();
    for (int i = 0; i < WIDE; i++)
        comm_all_gather(c, wide, wide + BIG, big);
    double t3 = now_ms();
    free(wide);
    if (comm_rank(c) == 0)
        printf("%s: barrier %.2f us, all_to_all of 64 bytes %.2f us, all_gather of 1 MiB each %.0f us\n",
               (const char *)arg, (t1 - t0) * 1e3 / TURNS, (t2 - t1) * 1e3 / TURNS, (t3 - t2) * 1e3 / WIDE);
    fflush(stdout);
    return comm_check(c, NULL);
}

static void latency(void **state)
{
    (void)state;
    assert_int_equal(run_ranks(SHM, 2, 4 << 20, latency_rank, "shared memory"), 0);
    assert_int_equal(run_ranks(TCP, 2, 0, latency_rank, "TCP"), 0);
}

static void nothing_stays_mapped(void **state)
{
    (void)state;
    FILE *maps = fopen("/proc/self/maps", "re");
    assert_non_null(maps);
    char line[1024];
    while (fgets(line, sizeof line, maps) != NULL)
        assert_null(strstr(line, "ditfleet-comm"));
    fclose(maps);
}

int main(void)
{
    done = mmap(NULL, sizeof *done, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (done == MAP_FAILED)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(traffic_is_delivered),
        cmocka_unit_test(long_messages_go_in_pieces),
        cmocka_unit_test(groups_are_reused),
        cmocka_unit_test(groups_nest),
        cmocka_unit_test(wrong_groups_are_refused),
        cmocka_unit_test(waits_time_out),
        cmocka_unit_test(waiting_is_told_from_moving),
        cmocka_unit_test(broken_rings_end),
        cmocka_unit_test(abort_wakes_everybody),
        cmocka_unit_test(abort_comes_from_any_thread),
        cmocka_unit_test(killed_rank_hangs_nobody),
        cmocka_unit_test(mismatch_is_told),
        cmocka_unit_test(a_killed_rank_is_known_to_all),
        cmocka_unit_test(who_leaves_is_not_waited_for),
        cmocka_unit_test(strangers_are_turned_away),
        cmocka_unit_test(silent_callers_give_way),
        cmocka_unit_test(only_one_group_meets),
        cmocka_unit_test(foreign_descriptors_are_refused),
        cmocka_unit_test(self_copies),
        cmocka_unit_test(dry_counts),
        cmocka_unit_test(latency),
        cmocka_unit_test(nothing_stays_mapped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
