// comm.c: the part of comm.h that is the same for every backend: arguments, the sticky error, abort, bytes counted.
#include "worker/comm/comm_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "proto/clock.h"

static const char *const op_names[] = {
    [COMM_BARRIER] = "barrier",     [COMM_ALL_TO_ALL] = "all_to_all", [COMM_ALL_GATHER] = "all_gather",
    [COMM_BROADCAST] = "broadcast", [COMM_GROUP] = "group",           [COMM_EXCHANGE] = "exchange",
    [COMM_FETCH] = "fetch",         [COMM_MEET] = "meeting",
};

void comm_init(struct comm *c, const struct comm_ops *ops, int rank, int size, struct abort_note *note)
{
    *c = (struct comm){.ops = ops, .root = c, .rank = rank, .size = size, .note = note};
}

int comm_rank(const struct comm *c)
{
    return c->rank;
}

int comm_size(const struct comm *c)
{
    return c->size;
}

uint64_t comm_bytes_sent(const struct comm *c)
{
    return c->bytes_sent;
}

uint64_t comm_collectives(const struct comm *c)
{
    return c->collectives;
}

struct comm_times comm_times(const struct comm *c)
{
    if (c->ops->times)
        return c->ops->times(c->root);
    return (struct comm_times){c->root->within - c->root->waiting, c->root->waiting};
}

void comm_set_timeout(struct comm *c, int timeout_ms)
{
    c->root->timeout_ms = timeout_ms > 0 ? timeout_ms : 0;
    if (c->ops->set_timeout)
        c->ops->set_timeout(c->root, timeout_ms);
}

int comm_open_memory(struct comm *c, bool willing, struct err *err)
{
    return c->ops->open_memory ? c->ops->open_memory(c, willing, err) : 0;
}

int comm_close_memory(struct comm *c, struct err *err)
{
    return c->ops->close_memory ? c->ops->close_memory(c, err) : 0;
}

bool comm_memory_is_open(struct comm *c)
{
    return c->ops->memory_is_open && c->ops->memory_is_open(c);
}

void comm_free(struct comm *c)
{
    if (c != NULL)
        c->ops->free(c);
}

void comm_copy(void *to, int64_t to_offset, const void *from, int64_t from_offset, int64_t bytes)
{
    if (bytes > 0 && (char *)to + to_offset != (const char *)from + from_offset)
        memcpy((char *)to + to_offset, (const char *)from + from_offset, (size_t)bytes);
}

// ---- failure

int comm_fail(struct comm *c, enum err_code code, enum comm_op op, const char *format, ...)
{
    struct err *first = &c->root->error;
    if (first->code != ERR_NONE)
        return code;
    char text[sizeof first->text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return err_set(first, code, "%s %llu of rank %d of %d: %s", op_names[op], (unsigned long long)c->sequence, c->rank,
                   c->size, text);
}

int comm_fail_aborted(struct comm *c)
{
    const struct abort_note *note = c->root->note;
    struct err *first = &c->root->error;
    const char *reason = note->reason[atomic_load(&note->chosen) - 1];
    if (first->code == ERR_NONE)
        err_set(first, ERR_UNAVAILABLE, "the group of ranks was stopped: %s",
                reason[0] != 0 ? reason : "no reason kept");
    return first->code;
}

int comm_fail_late(struct comm *c, enum comm_op op, const char *did_not, uint64_t missing)
{
    char list[256] = "";
    size_t used = 0;
    for (int r = 0; r < COMM_MAX_RANKS; r++)
        if (missing & rank_bit(r))
            used += (size_t)snprintf(list + used, sizeof list - used, "%s%d", used > 0 ? "," : "", r);
    return comm_fail(c, ERR_TIMEOUT, op, "missing ranks %s of the whole: they did not %s within %d ms",
                     used > 0 ? list : "not known", did_not, c->root->timeout_ms);
}

int comm_check(struct comm *c, struct err *err)
{
    if (c->root->error.code == ERR_NONE && comm_aborted(c))
        comm_fail_aborted(c);
    if (c->root->error.code != ERR_NONE && err != NULL)
        *err = c->root->error;
    return c->root->error.code;
}

void comm_abort(struct comm *c, const char *reason)
{
    struct abort_note *note = c->root->note;
    if (!comm_aborted(c)) {
        unsigned none = 0, slot = atomic_fetch_add(&note->drawn, 1);
        if (slot < ABORT_SLOTS)
            snprintf(note->reason[slot], sizeof note->reason[slot], "%s", reason);
        else
            slot = ABORT_SLOTS;
        atomic_compare_exchange_strong(&note->chosen, &none, slot + 1);
    }
    if (c->ops->wake != NULL)
        c->ops->wake(c);
}

// ---- collectives

// Whether a collective may begin. Opening a group is no concern of the ranks outside it: their count does not move.
static bool begin(struct comm *c, enum comm_op op)
{
    c->sequence += op != COMM_GROUP;
    for (struct comm *of = c; of != NULL && c->size > 1 && op != COMM_GROUP; of = of->parent)
        of->collectives++;
    c->root->began = monotonic_seconds();
    if (c->rank < 0)
        comm_fail(c, ERR_INVALID, op, "a watcher takes no part");
    return comm_check(c, NULL) == ERR_NONE;
}

// Counts are sane, so that sums of COMM_MAX_RANKS of them stay far from overflow.
static bool counts_valid(struct comm *c, enum comm_op op, const int64_t *counts)
{
    for (int r = 0; r < c->size; r++) {
        if (counts[r] < 0 || counts[r] > INT64_MAX / COMM_MAX_RANKS) {
            comm_fail(c, ERR_INTERNAL, op, "a count of %lld bytes for rank %d", (long long)counts[r], r);
            return false;
        }
    }
    return true;
}

static void end(struct comm *c)
{
    c->root->within += monotonic_seconds() - c->root->began;
}

void comm_count_sent(struct comm *c, int64_t bytes)
{
    for (; c != NULL; c = c->parent)
        c->bytes_sent += (uint64_t)bytes;
}

void comm_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                     void *recv, const int64_t *recv_counts, const int64_t *recv_offsets)
{
    if (!begin(c, COMM_ALL_TO_ALL) || !counts_valid(c, COMM_ALL_TO_ALL, send_counts) ||
        !counts_valid(c, COMM_ALL_TO_ALL, recv_counts))
        return;
    if (send_counts[c->rank] != recv_counts[c->rank]) {
        comm_fail(c, ERR_INTERNAL, COMM_ALL_TO_ALL, "sends itself %lld bytes and expects %lld",
                  (long long)send_counts[c->rank], (long long)recv_counts[c->rank]);
        return;
    }
    for (int r = 0; r < c->size; r++)
        comm_count_sent(c, r == c->rank ? 0 : send_counts[r]);
    c->ops->all_to_all(c, send, send_counts, send_offsets, recv, recv_counts, recv_offsets);
    end(c);
}

// An all-to-all of one piece a rank, whatever the backend: it moves no byte more and says as much when ranks disagree.
void comm_shift(struct comm *c, const void *send, int64_t send_bytes, void *recv, int64_t recv_bytes)
{
    int64_t out[COMM_MAX_RANKS] = {0}, in[COMM_MAX_RANKS] = {0};
    const int64_t offsets[COMM_MAX_RANKS] = {0};
    if (c->rank >= 0) { // a watcher is refused below
        out[(c->rank + 1) % c->size] = send_bytes;
        in[(c->rank + c->size - 1) % c->size] = recv_bytes;
    }
    comm_all_to_all(c, send, out, offsets, recv, in, offsets);
}

void comm_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts)
{
    if (!begin(c, COMM_ALL_GATHER) || !counts_valid(c, COMM_ALL_GATHER, counts))
        return;
    comm_count_sent(c, counts[c->rank] * (c->size - 1));
    c->ops->all_gather(c, send, recv, counts);
    end(c);
}

static bool memory_is_open(struct comm *c, enum comm_op op)
{
    if (!comm_memory_is_open(c))
        comm_fail(c, ERR_INTERNAL, op, "no memory is open");
    return c->root->error.code == ERR_NONE;
}

void comm_fetch(struct comm *c, const struct comm_lot *lots, int64_t lent, bool at_once)
{
    if (!begin(c, COMM_FETCH) || !memory_is_open(c, COMM_FETCH))
        return;
    comm_count_sent(c, lent);
    c->ops->fetch(c, lots, at_once);
    end(c);
}

void comm_meet(struct comm *c, bool beside)
{
    if (!begin(c, COMM_MEET) || !memory_is_open(c, COMM_MEET))
        return;
    c->ops->meet(c, beside);
    end(c);
}

void comm_fetched(struct comm *c, bool at_once)
{
    if (c->root->error.code == ERR_NONE && comm_memory_is_open(c))
        c->ops->fetched(c, at_once);
}

bool comm_on_device(const struct comm *c)
{
    return c->ops->exchange != NULL;
}

void comm_exchange(struct comm *c, int sends, const struct link_piece *send, int recvs, const struct link_piece *recv)
{
    if (!begin(c, COMM_EXCHANGE))
        return;
    if (sends > COMM_MAX_PIECES || recvs > COMM_MAX_PIECES || !c->ops->exchange) {
        comm_fail(c, ERR_INTERNAL, COMM_EXCHANGE, "%d pieces out and %d in", sends, recvs);
        return;
    }
    for (int i = 0; i < sends; i++)
        if (send[i].rank != c->rank)
            comm_count_sent(c, (int64_t)tensor_bytes(send[i].t));
    c->ops->exchange(c, sends, send, recvs, recv);
    end(c);
}

bool comm_attention(struct comm *c, int n, const struct link_piece *to, struct tensor q, struct tensor k,
                    struct tensor v, const struct attention_opts *opts)
{
    if (c->root->error.code != ERR_NONE || !comm_memory_is_open(c) || !c->ops->attention(c, n, to, q, k, v, opts))
        return false;
    for (int i = 0; i < n; i++)
        if (to[i].rank != c->rank)
            comm_count_sent(c, (int64_t)tensor_bytes(to[i].t));
    return true;
}

void comm_broadcast(struct comm *c, void *buffer, int64_t bytes, int root)
{
    if (!begin(c, COMM_BROADCAST))
        return;
    if (root < 0 || root >= c->size || bytes < 0 || bytes > INT64_MAX / COMM_MAX_RANKS) {
        comm_fail(c, ERR_INTERNAL, COMM_BROADCAST, "%lld bytes from rank %d", (long long)bytes, root);
        return;
    }
    if (root == c->rank)
        comm_count_sent(c, bytes * (c->size - 1));
    c->ops->broadcast(c, buffer, bytes, root);
    end(c);
}

void comm_barrier(struct comm *c)
{
    if (!begin(c, COMM_BARRIER))
        return;
    c->ops->barrier(c);
    end(c);
}

int comm_group(struct comm *c, int first, int stride, int count, struct comm **out, struct err *err)
{
    *out = NULL;
    if (first < 0 || stride < 1 || count < 1 || first >= c->size || count - 1 > (c->size - 1 - first) / stride)
        return err_set(err, ERR_INVALID, "group: %d ranks from %d on in steps of %d are not within the %d there are",
                       count, first, stride, c->size);
    int place = c->rank - first;
    if (place < 0 || place % stride != 0 || place / stride >= count)
        return err_set(err, ERR_INVALID, "group: rank %d is none of the %d ranks from %d on in steps of %d", c->rank,
                       count, first, stride);
    if (!begin(c, COMM_GROUP))
        return comm_check(c, err);
    const int code = c->ops->group(c, first, stride, count, out, err);
    end(c);
    TRY(code);
    (*out)->root = c->root;
    (*out)->parent = c;
    return 0;
}
