// shm.c: ranks of one host over shared memory. The region, made by comm_shm_region:
//
//   header   magic, shape, the abort note, a line for every rank (its sleep flag, its door)
//   blocks   where the members of one communicator meet: block 0 for the world, then BLOCKS_PER_RANK for each rank,
//            which lends them to the groups it leads (as their rank 0)
//   windows  two for each rank, for what it sends
//
// A message is a stream of bytes. Each round its owner copies the next piece into one of its windows, all members meet
// (barrier), each copies what is meant for it and takes its bit off the window's readers. One barrier a round is
// enough: an owner waits for the readers before it fills that window again, two messages later. The first piece brings
// along what the collective is (kind, number, sizes), so all members derive the number of rounds and see a mismatch
// before a byte is delivered.
//
// A rank sleeps on its own flag alone: it sets the flag, looks once more at what it waits for, sleeps. Who changes
// something that it may wait for then looks at the flag. All of these are sequentially consistent: one of the two sees
// the other. A rank killed at any point leaves words that are behind, never a lock.
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "worker/comm/message.h"

#define REGION_MAGIC    UINT64_C(0x6d68732d74666964) // "dift-shm"
#define REGION_VERSION  1
#define BLOCKS_PER_RANK 32
#define SLAB_MIN        256
#define SLAB_MAX        (INT64_C(1) << 32)
#define SPIN_NS         20000
#define ALL_BITS        (~UINT64_C(0))

struct rank_line {
    _Alignas(64) atomic_uint asleep; // futex: 1 while its rank sleeps or is about to
    atomic_uint attached;
    _Atomic uint64_t door;     // the group its rank is opening, see door_key; 0: none
    _Atomic uint64_t returned; // 1: a block it lent came back since it last looked
};

struct header {
    uint64_t magic;
    uint32_t version;
    uint32_t size;
    int64_t slab_bytes;
    int64_t total_bytes;
    struct abort_note note;
    struct rank_line ranks[COMM_MAX_RANKS];
};

struct block {
    _Alignas(64) _Atomic uint64_t arrived; // members that reached the round being met for
    _Atomic uint64_t round;                // rounds met
    _Atomic uint64_t holders;              // members that have not freed it; 0: may be lent again
    uint8_t window[2][COMM_MAX_RANKS];     // [round & 1][member]: which of its windows the piece is in
};

struct window {
    _Alignas(64) _Atomic uint64_t readers; // world ranks that have not read it yet
    // What the first piece says; the same words are in every member's message, or the collective fails.
    uint64_t sequence;
    uint32_t op;
    uint32_t block;
    int64_t total; // bytes of the stream
    int64_t counts[COMM_MAX_RANKS];
    uint8_t data[];
};

// One rank's hold on the region, shared by its communicators.
struct attachment {
    struct header *header;
    struct block *blocks;
    uint8_t *windows;
    int64_t window_stride, piece; // bytes from window to window; bytes of data in one
    int64_t mapped;               // bytes to unmap at the end, 0: the mapping is somebody else's
    int rank;                     // in the world
    int next_window;              // 0 or 1
    bool spin;                    // there is a core for every rank
};

struct shm_comm {
    struct comm base;
    struct attachment *at;
    uint32_t block;                  // index; 0 also for a group of one, which never meets anybody
    uint64_t round;                  // rounds met
    uint8_t members[COMM_MAX_RANKS]; // their ranks in the world
};

// ---- layout

static int64_t round_up(int64_t bytes, int64_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

static int64_t block_count(int size)
{
    return 1 + (int64_t)size * BLOCKS_PER_RANK;
}

static int64_t windows_offset(int size)
{
    return round_up(round_up(sizeof(struct header), 64) + block_count(size) * (int64_t)sizeof(struct block), 4096);
}

static int64_t window_stride(int64_t slab_bytes)
{
    return round_up((int64_t)sizeof(struct window) + slab_bytes / 2, 4096);
}

static int64_t region_bytes(int size, int64_t slab_bytes)
{
    return windows_offset(size) + 2 * size * window_stride(slab_bytes);
}

static struct window *window_of(const struct attachment *at, int rank, int which)
{
    return (struct window *)(at->windows + (2 * rank + which) * at->window_stride);
}

static struct block *block_of(const struct shm_comm *c)
{
    return &c->at->blocks[c->block];
}

static uint64_t all_members(const struct shm_comm *c)
{
    return ALL_BITS >> (64 - c->base.size);
}

// ---- waiting

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void wake(const struct attachment *at, int rank)
{
    atomic_uint *asleep = &at->header->ranks[rank].asleep;
    if (atomic_load(asleep) == 1 && atomic_exchange(asleep, 0) == 1)
        syscall(SYS_futex, asleep, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void wake_members(const struct shm_comm *c)
{
    for (int i = 0; i < c->base.size; i++)
        if (i != c->base.rank)
            wake(c->at, c->members[i]);
}

static bool spin_until(const _Atomic uint64_t *word, uint64_t mask, uint64_t value)
{
    int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if ((atomic_load(word) & mask) == value)
                return true;
            relax();
        }
    } while (now_ns() < end);
    return false;
}

static int sleep_until(const struct shm_comm *c, const _Atomic uint64_t *word, uint64_t mask, uint64_t value)
{
    atomic_uint *asleep = &c->at->header->ranks[c->at->rank].asleep;
    int timeout_ms = c->base.root->timeout_ms;
    int64_t end = now_ns() + timeout_ms * INT64_C(1000000);
    int code = 0;
    for (;;) {
        atomic_store(asleep, 1);
        if ((atomic_load(word) & mask) == value)
            break;
        code = comm_aborted(&c->base) ? ERR_UNAVAILABLE : 0;
        int64_t left = timeout_ms > 0 ? end - now_ns() : 0;
        if (code == 0 && timeout_ms > 0 && left <= 0)
            code = ERR_TIMEOUT;
        if (code != 0)
            break;
        struct timespec t = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        syscall(SYS_futex, asleep, FUTEX_WAIT, 1, timeout_ms > 0 ? &t : NULL, NULL, 0);
    }
    atomic_store(asleep, 0);
    return code;
}

// Waits until *word under mask is value. 0, ERR_UNAVAILABLE after an abort, or ERR_TIMEOUT; of these it records
// nothing.
static int wait_until(const struct shm_comm *c, const _Atomic uint64_t *word, uint64_t mask, uint64_t value)
{
    if ((atomic_load(word) & mask) == value)
        return 0;
    const int64_t began = now_ns();
    const int code = c->at->spin && spin_until(word, mask, value) ? 0 : sleep_until(c, word, mask, value);
    c->base.root->waiting += 1e-9 * (double)(now_ns() - began);
    return code;
}

// Records what wait_until returned. missing: world ranks.
static int fail_wait(struct shm_comm *c, int code, enum comm_op op, const char *did_not, uint64_t missing)
{
    return code == ERR_UNAVAILABLE ? comm_fail_aborted(&c->base) : comm_fail_late(&c->base, op, did_not, missing);
}

static uint64_t world_bits(const struct shm_comm *c, uint64_t members)
{
    uint64_t bits = 0;
    for (int i = 0; i < c->base.size; i++)
        if (members & rank_bit(i))
            bits |= rank_bit(c->members[i]);
    return bits;
}

// The barrier every round goes through. A group's first is its opening, where the leader waits for the others.
static int meet(struct shm_comm *c, enum comm_op op)
{
    struct block *b = block_of(c);
    uint64_t target = ++c->round;
    uint64_t arrived = atomic_fetch_or(&b->arrived, rank_bit(c->base.rank)) | rank_bit(c->base.rank);
    if (arrived == all_members(c)) {
        atomic_store(&b->arrived, 0);
        atomic_store(&b->round, target);
        wake_members(c);
        return 0;
    }
    if (op == COMM_GROUP)
        wake(c->at, c->members[0]);
    int code = wait_until(c, &b->round, ALL_BITS, target);
    if (code == 0)
        return 0;
    uint64_t missing = all_members(c) & ~atomic_load(&b->arrived);
    if (atomic_load(&b->round) == target) // the last one came while we looked
        return 0;
    return fail_wait(c, code, op, "arrive", world_bits(c, missing));
}

// ---- messages

// Where what a member sends to this rank begins in that member's stream, and how long the stream is.
struct source {
    int64_t begin, total;
};

// Streams of every length send a first piece; the others end with their last byte.
static bool has_piece(const struct shm_comm *c, int64_t round, int64_t total)
{
    return round == 0 || round * c->at->piece < total;
}

// The part of stream bytes [begin, begin + bytes) that falls into this round's piece.
struct part {
    int64_t in_bytes, in_piece, n; // offsets in those bytes and in the piece; n <= 0: nothing
};

static struct part part_of(const struct shm_comm *c, int64_t round, int64_t begin, int64_t bytes)
{
    int64_t start = round * c->at->piece, end = start + c->at->piece;
    int64_t from = begin > start ? begin : start, to = begin + bytes < end ? begin + bytes : end;
    return (struct part){.in_bytes = from - begin, .in_piece = from - start, .n = to - from};
}

// Of this rank's own: the pieces in rank order, or the one for everybody.
static int64_t stream_bytes(const struct shm_comm *c, const struct message *m)
{
    int64_t total = 0;
    for (int i = 0; i < c->base.size; i++)
        total += m->out[i].bytes;
    return total;
}

static int post(struct shm_comm *c, const struct message *m, int64_t round)
{
    struct attachment *at = c->at;
    struct window *w = window_of(at, at->rank, at->next_window);
    int code = wait_until(c, &w->readers, ALL_BITS, 0);
    if (code != 0)
        return fail_wait(c, code, m->op, "read the message before", atomic_load(&w->readers));
    if (round == 0) {
        w->sequence = c->base.sequence;
        w->op = m->op;
        w->block = c->block;
        w->total = stream_bytes(c, m);
        memcpy(w->counts, m->counts, (size_t)m->n_counts * sizeof *m->counts);
    }
    int64_t begin = 0;
    for (int i = 0; i < c->base.size; i++) {
        struct part p = part_of(c, round, begin, m->out[i].bytes);
        if (p.n > 0)
            memcpy(w->data + p.in_piece, m->out[i].from + p.in_bytes, (size_t)p.n);
        begin += m->out[i].bytes;
    }
    atomic_store(&w->readers, world_bits(c, all_members(c) & ~rank_bit(c->base.rank)));
    block_of(c)->window[(c->round + 1) & 1][c->base.rank] = (uint8_t)at->next_window;
    at->next_window ^= 1;
    return 0;
}

static struct window *posted_by(const struct shm_comm *c, int member)
{
    return window_of(c->at, c->members[member], block_of(c)->window[c->round & 1][member] & 1);
}

// Compares what member i posted first with what we do, and finds our place in its stream.
static int agree_with(struct shm_comm *c, const struct message *m, int i, struct source *source)
{
    const struct window *w = posted_by(c, i);
    if (w->op != m->op || w->sequence != c->base.sequence || w->block != c->block)
        return comm_fail(&c->base, ERR_INTERNAL, m->op, "rank %d called another collective (kind %u, number %llu)", i,
                         w->op, (unsigned long long)w->sequence);
    *source = (struct source){.total = w->total};
    int64_t sends = m->in[i].bytes;
    if (m->op == COMM_ALL_TO_ALL) {
        sends = w->counts[c->base.rank];
        for (int r = 0; r < c->base.rank; r++)
            source->begin += r == i ? 0 : w->counts[r];
    } else if (memcmp(w->counts, m->counts, (size_t)m->n_counts * sizeof *m->counts) != 0) {
        return comm_fail(&c->base, ERR_INTERNAL, m->op, "rank %d called it with other sizes or another root", i);
    }
    if (sends != m->in[i].bytes)
        return comm_fail(&c->base, ERR_INTERNAL, m->op, "rank %d sends %lld bytes where %lld are expected", i,
                         (long long)sends, (long long)m->in[i].bytes);
    return 0;
}

// Stops everybody on a disagreement: ranks that see none would wait for us.
static int agree(struct shm_comm *c, const struct message *m, struct source *sources, int64_t *rounds)
{
    int64_t longest = stream_bytes(c, m);
    for (int i = 0; i < c->base.size; i++) {
        if (i == c->base.rank)
            continue;
        int code = agree_with(c, m, i, &sources[i]);
        if (code != 0) {
            comm_abort(&c->base, c->base.root->error.text);
            return code;
        }
        longest = sources[i].total > longest ? sources[i].total : longest;
    }
    *rounds = longest > 0 ? (longest + c->at->piece - 1) / c->at->piece : 1;
    return 0;
}

static void take(struct shm_comm *c, const struct message *m, const struct source *sources, int64_t round)
{
    for (int step = 1; step < c->base.size; step++) { // each starts with another, so that they do not queue up
        int i = (c->base.rank + step) % c->base.size;
        if (!has_piece(c, round, sources[i].total))
            continue;
        struct window *w = posted_by(c, i);
        struct part p = part_of(c, round, sources[i].begin, m->in[i].bytes);
        if (p.n > 0)
            memcpy(m->in[i].to + p.in_bytes, w->data + p.in_piece, (size_t)p.n);
        if (atomic_fetch_and(&w->readers, ~rank_bit(c->at->rank)) == rank_bit(c->at->rank))
            wake(c->at, c->members[i]);
    }
}

static int shm_move(struct comm *base, const struct message *m)
{
    struct shm_comm *c = (struct shm_comm *)base;
    struct source sources[COMM_MAX_RANKS] = {{0}};
    const int64_t own = stream_bytes(c, m);
    int64_t rounds = 1;
    for (int64_t round = 0; round < rounds; round++) {
        if (has_piece(c, round, own))
            TRY(post(c, m, round));
        TRY(meet(c, m->op));
        if (round == 0)
            TRY(agree(c, m, sources, &rounds));
        take(c, m, sources, round);
    }
    return 0;
}

// ---- groups

// What a leader shows at its door while it opens a group: parent's block, the arguments, the slot of its block to
// meet in. A parent's block is lent again only after all members freed it, so the key is never mistaken for an older.
#define DOOR_SLOT_MASK UINT64_C(0xff)
static uint64_t door_key(uint32_t parent, int first, int stride, int count)
{
    return rank_bit(63) | (uint64_t)parent << 32 | (uint64_t)first << 24 | (uint64_t)stride << 16 |
           (uint64_t)count << 8;
}

static struct block *lent_by(const struct attachment *at, int leader, int slot)
{
    return &at->blocks[1 + leader * BLOCKS_PER_RANK + slot];
}

// The leader's choice of a block: a free one, or, when its members are late in freeing groups that it freed itself, the
// first to come back.
static int choose_slot(struct shm_comm *c, int *slot)
{
    _Atomic uint64_t *returned = &c->at->header->ranks[c->at->rank].returned;
    for (;;) {
        bool leaving = false;
        atomic_store(returned, 0);
        for (*slot = 0; *slot < BLOCKS_PER_RANK; ++*slot) {
            uint64_t holders = atomic_load(&lent_by(c->at, c->at->rank, *slot)->holders);
            if (holders == 0)
                return 0;
            leaving = leaving || (holders & rank_bit(0)) == 0;
        }
        if (!leaving)
            break;
        int code = wait_until(c, returned, ALL_BITS, 1);
        if (code != 0)
            return fail_wait(c, code, COMM_GROUP, "free an older group", 0);
    }
    int code =
        comm_fail(&c->base, ERR_UNSUPPORTED, COMM_GROUP, "a rank leads %d groups at most; free some", BLOCKS_PER_RANK);
    comm_abort(&c->base, c->base.root->error.text); // the members would wait at the door
    return code;
}

// Lends a block and waits until every other member came in. The door closes before anyone leaves the first meeting, so
// nobody can take it for the next group of the same arguments; after a failure it stays as it is, like all the rest.
static int lead_group(struct shm_comm *g, uint64_t key)
{
    int slot = 0;
    TRY(choose_slot(g, &slot));
    g->block = 1 + (uint32_t)(g->at->rank * BLOCKS_PER_RANK + slot);
    struct block *b = block_of(g);
    _Atomic uint64_t *door = &g->at->header->ranks[g->at->rank].door;
    atomic_store(&b->arrived, 0);
    atomic_store(&b->round, 0);
    atomic_store(&b->holders, all_members(g));
    atomic_store(door, key | (uint64_t)slot);
    wake_members(g);
    uint64_t others = all_members(g) & ~rank_bit(0);
    int code = wait_until(g, &b->arrived, ALL_BITS, others);
    if (code != 0)
        return fail_wait(g, code, COMM_GROUP, "come", world_bits(g, others & ~atomic_load(&b->arrived)));
    atomic_store(door, 0);
    return meet(g, COMM_GROUP);
}

// A member reads the block's number off its leader's door.
static int join_group(struct shm_comm *g, uint64_t key)
{
    int leader = g->members[0];
    const _Atomic uint64_t *door = &g->at->header->ranks[leader].door;
    int code = wait_until(g, door, ~DOOR_SLOT_MASK, key);
    if (code != 0)
        return fail_wait(g, code, COMM_GROUP, "open it", rank_bit(leader));
    g->block = 1 + (uint32_t)leader * BLOCKS_PER_RANK + (uint32_t)(atomic_load(door) & DOOR_SLOT_MASK);
    return meet(g, COMM_GROUP);
}

static void shm_free(struct comm *base)
{
    struct shm_comm *c = (struct shm_comm *)base;
    struct attachment *at = c->at;
    if (c->block != 0) {
        uint64_t before = atomic_fetch_and(&block_of(c)->holders, ~rank_bit(base->rank));
        if (before == rank_bit(base->rank)) {
            atomic_store(&at->header->ranks[c->members[0]].returned, 1);
            wake(at, c->members[0]);
        }
    }
    if (base->parent == NULL) {
        if (at->mapped > 0)
            munmap(at->header, (size_t)at->mapped);
        free(at);
    }
    free(c);
}

static int shm_group(struct comm *base, int first, int stride, int count, struct comm **out, struct err *err)
{
    struct shm_comm *c = (struct shm_comm *)base;
    struct shm_comm *g = calloc(1, sizeof *g);
    if (g == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    comm_init(&g->base, base->ops, (base->rank - first) / stride, count, NULL);
    g->base.root = base->root;
    g->base.parent = base;
    g->at = c->at;
    for (int i = 0; i < count; i++)
        g->members[i] = c->members[first + i * stride];
    uint64_t key = door_key(c->block, first, stride, count);
    int code = count == 1 ? 0 : g->base.rank == 0 ? lead_group(g, key) : join_group(g, key);
    if (code != 0) {
        shm_free(&g->base);
        return comm_check(base, err);
    }
    *out = &g->base;
    return 0;
}

static void shm_wake(struct comm *base)
{
    const struct attachment *at = ((struct shm_comm *)base)->at;
    for (uint32_t r = 0; r < at->header->size; r++)
        wake(at, (int)r);
}

static const struct comm_ops shm_ops = {
    .all_to_all = message_all_to_all,
    .all_gather = message_all_gather,
    .broadcast = message_broadcast,
    .barrier = message_barrier,
    .move = shm_move,
    .group = shm_group,
    .wake = shm_wake,
    .free = shm_free,
};

// ---- region

static bool shape_valid(int64_t size, int64_t slab_bytes)
{
    return size >= 1 && size <= COMM_MAX_RANKS && slab_bytes >= SLAB_MIN && slab_bytes <= SLAB_MAX;
}

int comm_shm_region(int size, int64_t slab_bytes, struct err *err)
{
    if (!shape_valid(size, slab_bytes)) {
        err_set(err, ERR_INVALID, "a region for %d ranks with windows of %lld bytes: 1 to %d ranks, %d to %lld bytes",
                size, (long long)slab_bytes, COMM_MAX_RANKS, SLAB_MIN, (long long)SLAB_MAX);
        return -1;
    }
    int64_t bytes = region_bytes(size, slab_bytes);
    int fd = memfd_create("ditfleet-comm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        err_set(err, ERR_IO, "memfd_create: %s", strerror(errno));
        return -1;
    }
    struct header *h = MAP_FAILED;
    if (ftruncate(fd, bytes) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        h = mmap(NULL, sizeof *h, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED) {
        err_set(err, ERR_IO, "a shared region of %lld bytes: %s", (long long)bytes, strerror(errno));
        close(fd);
        return -1;
    }
    h->version = REGION_VERSION;
    h->size = (uint32_t)size;
    h->slab_bytes = slab_bytes;
    h->total_bytes = bytes;
    h->magic = REGION_MAGIC;
    munmap(h, sizeof *h);
    return fd;
}

// Refuses what is no region of ours, so that nothing beyond the mapping is ever touched.
static int check_region(const struct header *h, int64_t bytes, int rank, struct err *err)
{
    if (bytes < (int64_t)sizeof *h || h->magic != REGION_MAGIC || h->version != REGION_VERSION)
        return err_set(err, ERR_CORRUPT, "the descriptor holds no region of ranks (version %d); pass the supervisor's",
                       REGION_VERSION);
    if (!shape_valid(h->size, h->slab_bytes) || h->total_bytes != bytes ||
        region_bytes((int)h->size, h->slab_bytes) != bytes)
        return err_set(err, ERR_CORRUPT, "the region of ranks has %lld bytes, not what its %u ranks need",
                       (long long)bytes, h->size);
    if (rank < -1 || rank >= (int)h->size)
        return err_set(err, ERR_INVALID, "rank %d of %u: ranks count from 0; -1 watches", rank, h->size);
    return 0;
}

static bool core_for_each(int ranks)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) >= ranks;
}

static void attachment_init(struct attachment *at, struct header *h, int64_t mapped, int rank)
{
    *at = (struct attachment){
        .header = h,
        .blocks = (struct block *)((uint8_t *)h + round_up(sizeof *h, 64)),
        .windows = (uint8_t *)h + windows_offset((int)h->size),
        .window_stride = window_stride(h->slab_bytes),
        .piece = h->slab_bytes / 2,
        .mapped = mapped,
        .rank = rank,
        .spin = core_for_each((int)h->size),
    };
}

// own: unmap it in the end, or at once when this fails.
static int attach(void *region, int64_t bytes, bool own, int rank, struct comm **out, struct err *err)
{
    struct header *h = region;
    struct attachment *at = calloc(1, sizeof *at);
    struct shm_comm *c = calloc(1, sizeof *c);
    int code = 0;
    if (at == NULL || c == NULL)
        code = err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    else if ((code = check_region(h, bytes, rank, err)) == 0 && rank >= 0 &&
             atomic_exchange(&h->ranks[rank].attached, 1) != 0)
        code =
            err_set(err, ERR_CONFLICT, "rank %d has attached already; a new group of ranks needs a new region", rank);
    if (at == NULL || c == NULL || code != 0) {
        if (own)
            munmap(region, (size_t)bytes);
        free(at);
        free(c);
        return code;
    }
    attachment_init(at, h, own ? bytes : 0, rank);
    comm_init(&c->base, &shm_ops, rank, (int)h->size, &h->note);
    c->at = at;
    for (int i = 0; i < c->base.size; i++)
        c->members[i] = (uint8_t)i;
    *out = &c->base;
    return 0;
}

int comm_shm_attach_mapped(void *region, int64_t bytes, int rank, struct comm **out, struct err *err)
{
    *out = NULL;
    return attach(region, bytes, false, rank, out, err);
}

int comm_shm_attach(int fd, int rank, struct comm **out, struct err *err)
{
    *out = NULL;
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS); // only a sealed memfd cannot be cut short under our feet
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd, &st) != 0 || st.st_size < (off_t)sizeof(struct header))
        return err_set(err, ERR_CORRUPT, "descriptor %d is no region of ranks; pass the supervisor's", fd);
    void *region = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (region == MAP_FAILED)
        return err_set(err, ERR_IO, "mapping %lld bytes of descriptor %d: %s", (long long)st.st_size, fd,
                       strerror(errno));
    return attach(region, st.st_size, true, rank, out, err);
}
