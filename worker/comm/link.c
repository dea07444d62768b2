// link.c: ranks whose devices send each other rows themselves (the links of kernels.h). Every collective is one
// exchange of pieces, queued like an operation of the device; groups are some of the link's ranks.
//
// A thread watches. What another rank's end leaves waiting on a device can only be ended from outside: it does so when
// the ranks' control communicator was stopped, when the link reports a failure, and when nothing moves for too long.
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/clock.h"
#include "worker/comm/comm_internal.h"

enum { LOOK_MS = 20, DEADLINE_MS = 300000 };

struct link_world {
    const struct kernels *k;
    struct device *d;
    struct link *link;
    struct comm *control;
    struct abort_note note;
    pthread_t watcher;
    bool watched;
    atomic_bool leaving;
    atomic_int deadline_ms;
};

struct link_comm {
    struct comm base;
    struct link_world *world; // owned by the root
    int first, stride;        // of its ranks among the world's
};

static struct link_comm *link_of(struct comm *c)
{
    return (struct link_comm *)c;
}

static int world_rank(const struct link_comm *c, int rank)
{
    return c->first + rank * c->stride;
}

// ---- collectives

static void exchange(struct comm *c, const char *what, int sends, const struct link_piece *send, int recvs,
                     const struct link_piece *recv)
{
    const struct link_world *w = link_of(c)->world;
    struct link_piece out[COMM_MAX_PIECES], in[COMM_MAX_PIECES];
    for (int i = 0; i < sends; i++)
        out[i] = (struct link_piece){world_rank(link_of(c), send[i].rank), send[i].t};
    for (int i = 0; i < recvs; i++)
        in[i] = (struct link_piece){world_rank(link_of(c), recv[i].rank), recv[i].t};
    w->k->exchange(w->d, w->link, what, sends, out, recvs, in);
}

static struct link_piece bytes_of(int rank, const void *at, int64_t offset, int64_t bytes)
{
    return (struct link_piece){rank,
                               {.data = (char *)at + offset, // sends are only read
                                .dtype = DT_U8,
                                .dims = 1,
                                .n = {bytes, 1, 1, 1},
                                .ld = 1}};
}

static void link_exchange(struct comm *c, int sends, const struct link_piece *send, int recvs,
                          const struct link_piece *recv)
{
    for (int i = 0; i < sends; i++)
        comm_count_sent(c, send[i].rank == c->rank ? 0 : (int64_t)tensor_bytes(send[i].t));
    exchange(c, "exchange", sends, send, recvs, recv);
}

static void link_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                            void *recv, const int64_t *recv_counts, const int64_t *recv_offsets)
{
    struct link_piece out[COMM_MAX_RANKS], in[COMM_MAX_RANKS];
    for (int r = 0; r < c->size; r++) {
        out[r] = bytes_of(r, send, send_offsets[r], send_counts[r]);
        in[r] = bytes_of(r, recv, recv_offsets[r], recv_counts[r]);
    }
    exchange(c, "all_to_all", c->size, out, c->size, in);
}

static void link_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts)
{
    struct link_piece out[COMM_MAX_RANKS], in[COMM_MAX_RANKS];
    int64_t at = 0;
    for (int r = 0; r < c->size; at += counts[r++]) {
        out[r] = bytes_of(r, send, 0, counts[c->rank]);
        in[r] = bytes_of(r, recv, at, counts[r]);
    }
    exchange(c, "all_gather", c->size, out, c->size, in);
}

static void link_broadcast(struct comm *c, void *buffer, int64_t bytes, int root)
{
    struct link_piece pieces[COMM_MAX_RANKS];
    int n = 0;
    for (int r = 0; r < c->size; r++)
        if (r != c->rank && (c->rank == root || r == root))
            pieces[n++] = bytes_of(r, buffer, 0, bytes);
    exchange(c, "broadcast", c->rank == root ? n : 0, pieces, c->rank == root ? 0 : n, pieces);
}

static void link_barrier(struct comm *c)
{
    struct err err;
    if (c->size > 1 && link_of(c)->world->k->sync(link_of(c)->world->d, &err) != 0)
        comm_fail(c, err.code, COMM_BARRIER, "%s", err.text);
    comm_barrier(link_of(c)->world->control);
}

static int link_group(struct comm *c, int first, int stride, int count, struct comm **out, struct err *err)
{
    const struct link_comm *parent = link_of(c);
    struct link_comm *made = calloc(1, sizeof *made);
    if (!made)
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    comm_init(&made->base, c->ops, (c->rank - first) / stride, count, NULL);
    made->world = parent->world;
    made->first = world_rank(parent, first);
    made->stride = parent->stride * stride;
    *out = &made->base;
    return 0;
}

static struct comm_times link_times(struct comm *c)
{
    const struct link_world *w = link_of(c)->world;
    struct link_state state;
    w->k->link_state(w->link, &state);
    return (struct comm_times){state.seconds - state.waited, state.waited};
}

// All ranks hear of all.
static int tell_all(const struct link_world *w, const void *mine, void *all, int64_t bytes, struct err *err)
{
    int64_t counts[COMM_MAX_RANKS];
    for (int r = 0; r < comm_size(w->control); r++)
        counts[r] = bytes;
    comm_all_gather(w->control, mine, all, counts);
    return comm_check(w->control, err);
}

// What all have told in exports; or none of them has it.
static int import_all(struct link_world *w, const char *exports, struct err *err)
{
    bool fine[COMM_MAX_RANKS] = {false};
    const bool mine = w->k->link_import(w->link, exports);
    TRY(tell_all(w, &mine, fine, sizeof mine, err));
    for (int r = 0; r < comm_size(w->control); r++)
        if (!fine[r]) {
            w->k->link_forget(w->link);
            break;
        }
    return 0;
}

static int link_open_memory(struct comm *c, bool willing, struct err *err)
{
    struct link_world *w = link_of(c)->world;
    char mine[LINK_EXPORT_BYTES] = {0}, *all;
    if (!w->k->link_export)
        return 0;
    if (!(all = calloc((size_t)comm_size(w->control), sizeof mine))) {
        comm_abort(w->control, "no memory for a link");
        return err_set(err, ERR_NO_MEMORY, "no memory for a link");
    }
    if (willing)
        w->k->link_export(w->link, mine);
    int rc = tell_all(w, mine, all, sizeof mine, err);
    if (rc == 0)
        rc = import_all(w, all, err);
    free(all);
    return rc;
}

static int link_close_memory(struct comm *c, struct err *err)
{
    struct link_world *w = link_of(c)->world;
    if (!w->k->link_export)
        return 0;
    w->k->link_forget(w->link);
    comm_barrier(w->control); // nobody frees what another still sees
    return comm_check(w->control, err);
}

static bool link_memory_is_open(struct comm *c)
{
    const struct link_world *w = link_of(c)->world;
    struct link_state state;
    w->k->link_state(w->link, &state);
    return state.direct;
}

static void link_fetch(struct comm *c, const struct comm_lot *lots, bool at_once)
{
    const struct link_world *w = link_of(c)->world;
    for (int r = 0; r < c->size; r++)
        if (lots[r].bytes > 0)
            w->k->link_fetch(w->d, w->link, world_rank(link_of(c), r), lots[r].from, lots[r].to, lots[r].bytes,
                             at_once);
}

static void link_fetched(struct comm *c, bool at_once)
{
    const struct link_world *w = link_of(c)->world;
    w->k->link_fetched(w->d, w->link, at_once);
}

static void link_meet(struct comm *c, bool beside)
{
    const struct link_world *w = link_of(c)->world;
    int ranks[COMM_MAX_RANKS];
    for (int r = 0; r < c->size; r++)
        ranks[r] = world_rank(link_of(c), r);
    w->k->link_meet(w->d, w->link, c->size, ranks, beside);
}

static bool link_attention(struct comm *c, int n, const struct link_piece *to, struct tensor q, struct tensor k,
                           struct tensor v, const struct attention_opts *opts)
{
    const struct link_world *w = link_of(c)->world;
    struct link_piece pieces[COMM_MAX_RANKS];
    for (int i = 0; i < n; i++)
        pieces[i] = (struct link_piece){world_rank(link_of(c), to[i].rank), to[i].t};
    return w->k->link_attention(w->d, w->link, n, pieces, q, k, v, opts);
}

static void link_set_timeout(struct comm *c, int timeout_ms)
{
    atomic_store(&link_of(c)->world->deadline_ms, timeout_ms > 0 ? timeout_ms : DEADLINE_MS);
}

static void link_free(struct comm *c)
{
    struct link_world *w = link_of(c)->world;
    if (c->root == c) {
        atomic_store(&w->leaving, true);
        if (w->watched)
            pthread_join(w->watcher, NULL);
        w->k->unlink(w->link);
        free(w);
    }
    free(c);
}

static const struct comm_ops link_ops = {
    .exchange = link_exchange,
    .all_to_all = link_all_to_all,
    .all_gather = link_all_gather,
    .broadcast = link_broadcast,
    .barrier = link_barrier,
    .group = link_group,
    .times = link_times,
    .open_memory = link_open_memory,
    .close_memory = link_close_memory,
    .memory_is_open = link_memory_is_open,
    .fetch = link_fetch,
    .fetched = link_fetched,
    .meet = link_meet,
    .attention = link_attention,
    .set_timeout = link_set_timeout,
    .free = link_free,
};

// ---- the watcher

// What has been seen of the link, and since when it has not moved.
struct view {
    uint64_t done;
    double since;
};

// Whether the link is to be ended, and why: err.
static bool is_over(struct link_comm *c, struct view *v, struct err *err)
{
    struct link_world *w = c->world;
    struct link_state state;
    const double now = monotonic_seconds();
    const int deadline_ms = atomic_load(&w->deadline_ms);
    if (comm_aborted(w->control) || comm_aborted(&c->base)) {
        const struct abort_note *note = comm_aborted(&c->base) ? &w->note : w->control->root->note;
        err_set(err, ERR_UNAVAILABLE, "%s", note->reason[atomic_load(&note->chosen) - 1]);
        return true;
    }
    if (w->k->link_check(w->link, err) != 0)
        return true;
    w->k->link_state(w->link, &state);
    if (state.done != v->done || state.done == state.begun)
        *v = (struct view){state.done, now};
    if ((now - v->since) * 1e3 < deadline_ms)
        return false;
    err_set(err, ERR_TIMEOUT, "%s %llu of rank %d of %d did not end within %d ms: another rank hangs, or the way to it",
            state.what ? state.what : "exchange", (unsigned long long)state.done, c->base.rank, c->base.size,
            deadline_ms);
    return true;
}

static void *watch(void *arg)
{
    struct link_comm *c = arg;
    struct link_world *w = c->world;
    struct view view = {0, monotonic_seconds()};
    struct err err = {.code = ERR_NONE};
    while (!atomic_load(&w->leaving)) {
        if (is_over(c, &view, &err)) {
            comm_abort(&c->base, err.text);
            comm_abort(w->control, err.text);
            w->k->link_abort(w->link);
            break;
        }
        poll(NULL, 0, LOOK_MS);
    }
    return NULL;
}

// ---- the beginning

// What a rank has to say before the first word is sent between devices.
struct introduction {
    char kind[LINK_KIND_BYTES], place[LINK_KIND_BYTES];
};

static int compare(const struct introduction *all, int ranks, struct err *err)
{
    for (int r = 1; r < ranks; r++) {
        if (strcmp(all[r].kind, all[0].kind) != 0)
            return err_set(err, ERR_INVALID,
                           "the ranks of a group need GPUs and libraries that are alike: rank 0 has %s, rank %d has %s",
                           all[0].kind, r, all[r].kind);
        for (int other = 0; other < r; other++)
            if (strcmp(all[r].place, all[other].place) == 0)
                return err_set(err, ERR_INVALID, "rank %d and rank %d both have %s: each rank needs a GPU of its own",
                               other, r, all[r].place);
    }
    return 0;
}

static int introduce(const struct link_world *w, struct err *err)
{
    struct introduction mine = {.kind = ""}, *all = calloc((size_t)comm_size(w->control), sizeof *all);
    if (!all)
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    w->k->link_kind(w->d, mine.kind, mine.place);
    int rc = tell_all(w, &mine, all, sizeof mine, err);
    if (rc == 0)
        rc = compare(all, comm_size(w->control), err);
    free(all);
    return rc;
}

// Rank 0 draws the name; all hear whether it could.
static int name_link(struct comm *control, const struct kernels *k, char name[LINK_NAME_BYTES], struct err *err)
{
    struct {
        char name[LINK_NAME_BYTES];
        struct err err;
    } said = {.err.code = ERR_NONE};
    if (comm_rank(control) == 0)
        k->link_name(said.name, &said.err);
    comm_broadcast(control, &said, sizeof said, 0);
    TRY(comm_check(control, err));
    memcpy(name, said.name, sizeof said.name);
    return said.err.code == ERR_NONE ? 0 : err_set(err, said.err.code, "%s", said.err.text);
}

static int open_world(struct link_comm *c, int timeout_ms, struct err *err)
{
    struct link_world *w = c->world;
    char name[LINK_NAME_BYTES];
    TRY(introduce(w, err));
    TRY(name_link(w->control, w->k, name, err));
    TRY(w->k->link(w->d, name, c->base.rank, c->base.size, timeout_ms, &w->link, err));
    w->watched = pthread_create(&w->watcher, NULL, watch, c) == 0;
    return w->watched ? 0 : err_set(err, ERR_NO_MEMORY, "no thread to watch a link: %s", strerror(errno));
}

int comm_link_new(struct comm *control, const struct kernels *k, struct device *d, int timeout_ms, struct comm **out,
                  struct err *err)
{
    struct link_comm *c = calloc(1, sizeof *c);
    struct link_world *w = calloc(1, sizeof *w);
    *out = NULL;
    if (!c || !w) {
        free(c);
        free(w);
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    }
    *w = (struct link_world){.k = k, .d = d, .control = control, .deadline_ms = DEADLINE_MS};
    comm_init(&c->base, &link_ops, comm_rank(control), comm_size(control), &w->note);
    c->world = w;
    c->stride = 1;
    const int rc = open_world(c, timeout_ms, err);
    if (rc != 0)
        link_free(&c->base);
    else
        *out = &c->base;
    return rc;
}
