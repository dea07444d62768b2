// thread_link.h: the CPU's kernels with links (kernels.h) between devices of threads of one process. They see each
// other's memory as GPUs of one host do; so what runs on those by direct memory runs here, for any number of ranks.
//
// Late, what may be done beside other work is done at the last moment that is allowed: a meeting beside, and a fetch,
// when fetched is called. Else at the first one. Whoever writes too early what others still fetch, or reads too early,
// is found by one of the two, and by ThreadSanitizer. Late attention goes straight to the ranks; early there is none.
#ifndef DITFLEET_TESTS_THREAD_LINK_H
#define DITFLEET_TESTS_THREAD_LINK_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

enum { LINK_RANKS = 8, LINK_FETCHES = 64 };

struct link_fetch {
    const void *from;
    void *to;
    size_t bytes;
    bool at_once;
};

struct shared_link {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int joined, left;
    bool given_up;
    struct {
        const struct link_piece *pieces; // of an exchange, for all ranks; NULL: none
        int count;
        uint64_t met; // how often it came to meet the other
    } from_to[LINK_RANKS][LINK_RANKS];
};

struct link {
    struct shared_link *shared;
    int rank, ranks;
    bool late, direct;
    uint64_t exchanges;
    int awaited[LINK_RANKS], n_awaited; // of a meeting beside
    struct link_fetch fetch[LINK_FETCHES];
    int n_fetch;
};

static inline void thread_link_kind(struct device *d, char *kind, char *place)
{
    snprintf(kind, LINK_KIND_BYTES, "threads");
    snprintf(place, LINK_KIND_BYTES, "%p", (void *)d);
}

static inline int thread_link_name(void *name, struct err *err)
{
    struct shared_link *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NO_MEMORY, "no memory for a link");
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    memcpy(name, &s, sizeof(void *));
    return 0;
}

static inline int thread_link(const void *name, int rank, int ranks, bool late, struct link **out)
{
    struct link *l = calloc(1, sizeof *l);
    if (!l)
        abort();
    memcpy(&l->shared, name, sizeof(void *));
    l->rank = rank, l->ranks = ranks, l->late = late;
    struct shared_link *s = l->shared;
    pthread_mutex_lock(&s->lock);
    s->joined++;
    pthread_cond_broadcast(&s->changed);
    while (s->joined < ranks)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
    *out = l;
    return 0;
}

static inline int thread_link_early(struct device *d, const void *name, int rank, int ranks, int timeout_ms,
                                    struct link **out, struct err *err)
{
    (void)d, (void)timeout_ms, (void)err;
    return thread_link(name, rank, ranks, false, out);
}

static inline int thread_link_late(struct device *d, const void *name, int rank, int ranks, int timeout_ms,
                                   struct link **out, struct err *err)
{
    (void)d, (void)timeout_ms, (void)err;
    return thread_link(name, rank, ranks, true, out);
}

static inline void thread_unlink(struct link *l)
{
    struct shared_link *s = l ? l->shared : NULL;
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    const bool last = ++s->left == l->ranks;
    pthread_mutex_unlock(&s->lock);
    if (last) {
        pthread_mutex_destroy(&s->lock);
        pthread_cond_destroy(&s->changed);
        free(s);
    }
    free(l);
}

// Waits, with the lock, for the next change; false: given up.
static inline bool thread_link_wait(struct shared_link *s)
{
    if (!s->given_up)
        pthread_cond_wait(&s->changed, &s->lock);
    return !s->given_up;
}

// ---- exchanges

static inline int pieces_of(const struct link_piece *list, int n, int rank)
{
    int count = 0;
    for (int i = 0; i < n; i++)
        count += list[i].rank == rank;
    return count;
}

static inline void copy_rows(struct tensor to, struct tensor from)
{
    const int64_t rows = to.dims == 1 ? 1 : to.n[0], size = (int64_t)dtype_size(to.dtype);
    if (tensor_bytes(to) == 0 || to.data == from.data) // in its place others may read it
        return;
    for (int64_t i = 0; i < rows; i++)
        memcpy((char *)to.data + i * to.ld * size, (const char *)from.data + i * from.ld * size,
               tensor_bytes(to) / (size_t)rows);
}

// Mine from a rank, in its order: what it has for me.
static inline void take_from(const struct link *l, int rank, int recvs, const struct link_piece *recv)
{
    const struct link_piece *theirs = l->shared->from_to[rank][l->rank].pieces;
    const int n = l->shared->from_to[rank][l->rank].count;
    int at = 0;
    for (int i = 0; i < recvs; i++) {
        if (recv[i].rank != rank)
            continue;
        while (at < n && theirs[at].rank != l->rank)
            at++;
        if (at == n || tensor_bytes(theirs[at].t) != tensor_bytes(recv[i].t))
            abort(); // the ranks do not agree
        copy_rows(recv[i].t, theirs[at++].t);
    }
}

static inline void thread_exchange(struct device *d, struct link *l, const char *what, int sends,
                                   const struct link_piece *send, int recvs, const struct link_piece *recv)
{
    struct shared_link *s = l->shared;
    bool go_on = true;
    (void)d, (void)what;
    pthread_mutex_lock(&s->lock);
    for (int r = 0; r < l->ranks; r++)
        if (pieces_of(send, sends, r) > 0) {
            s->from_to[l->rank][r].pieces = send;
            s->from_to[l->rank][r].count = sends;
        }
    pthread_cond_broadcast(&s->changed);
    for (int r = 0; r < l->ranks; r++) {
        if (pieces_of(recv, recvs, r) == 0)
            continue;
        while (go_on && !s->from_to[r][l->rank].pieces)
            go_on = thread_link_wait(s);
        pthread_mutex_unlock(&s->lock);
        if (go_on)
            take_from(l, r, recvs, recv);
        pthread_mutex_lock(&s->lock);
        s->from_to[r][l->rank].pieces = NULL;
        pthread_cond_broadcast(&s->changed);
    }
    for (int r = 0; r < l->ranks; r++)
        while (go_on && s->from_to[l->rank][r].pieces)
            go_on = thread_link_wait(s);
    l->exchanges++;
    pthread_mutex_unlock(&s->lock);
}

static inline int thread_link_check(struct link *l, struct err *err)
{
    (void)l, (void)err;
    return 0;
}

static inline void thread_link_state(struct link *l, struct link_state *out)
{
    pthread_mutex_lock(&l->shared->lock);
    *out = (struct link_state){.begun = l->exchanges, .done = l->exchanges, .direct = l->direct};
    pthread_mutex_unlock(&l->shared->lock);
}

static inline void thread_link_abort(struct link *l)
{
    pthread_mutex_lock(&l->shared->lock);
    l->shared->given_up = true;
    pthread_cond_broadcast(&l->shared->changed);
    pthread_mutex_unlock(&l->shared->lock);
}

// ---- each other's memory

static inline void thread_link_export(struct link *l, void *to)
{
    (void)l;
    *(char *)to = 1; // willing
}

static inline bool thread_link_import(struct link *l, const void *all)
{
    bool every = true;
    for (int r = 0; r < l->ranks; r++)
        every = every && ((const char *)all)[r * LINK_EXPORT_BYTES];
    pthread_mutex_lock(&l->shared->lock);
    l->direct = every;
    pthread_mutex_unlock(&l->shared->lock);
    return every;
}

static inline void thread_link_forget(struct link *l)
{
    pthread_mutex_lock(&l->shared->lock);
    l->direct = false;
    pthread_mutex_unlock(&l->shared->lock);
}

// For the ranks that were told to be awaited.
static inline void meet_them(struct link *l)
{
    struct shared_link *s = l->shared;
    bool go_on = true;
    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < l->n_awaited; i++) {
        const int r = l->awaited[i];
        while (go_on && s->from_to[r][l->rank].met < s->from_to[l->rank][r].met)
            go_on = thread_link_wait(s);
    }
    pthread_mutex_unlock(&s->lock);
    l->n_awaited = 0;
}

static inline void thread_link_meet(struct device *d, struct link *l, int n, const int *ranks, bool beside)
{
    struct shared_link *s = l->shared;
    (void)d;
    meet_them(l);
    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < n; i++) {
        s->from_to[l->rank][ranks[i]].met++;
        l->awaited[l->n_awaited++] = ranks[i];
    }
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (!beside || !l->late)
        meet_them(l);
}

static inline void thread_link_fetched(struct device *d, struct link *l, bool at_once)
{
    int kept = 0;
    (void)d;
    meet_them(l);
    for (int i = 0; i < l->n_fetch; i++)
        if (l->fetch[i].at_once == at_once)
            memcpy(l->fetch[i].to, l->fetch[i].from, l->fetch[i].bytes);
        else
            l->fetch[kept++] = l->fetch[i];
    l->n_fetch = kept;
}

static inline void thread_link_fetch(struct device *d, struct link *l, int rank, const void *from, void *to,
                                     int64_t bytes, bool at_once)
{
    (void)rank;
    if (from == to)
        return; // one's own, in its place
    if (l->n_fetch == LINK_FETCHES)
        abort();
    l->fetch[l->n_fetch++] = (struct link_fetch){from, to, (size_t)bytes, at_once};
    if (!l->late)
        thread_link_fetched(d, l, at_once);
}

static inline bool thread_link_attention(struct device *d, struct link *l, int n, const struct link_piece *to,
                                         struct tensor q, struct tensor k, struct tensor v,
                                         const struct attention_opts *opts)
{
    struct err err;
    struct tensor all = tensor_reshape(tensor_1d(NULL, q.dtype, tensor_count(q)), 3, q.n[0], q.n[1], q.n[2], 1);
    int64_t at = 0;
    if (!l->late)
        return false;
    if (kernels_cpu.alloc(d, tensor_bytes(all), &all.data, &err) != 0)
        abort();
    kernels_cpu.attention(d, all, q, k, v, opts);
    for (int i = 0; i < n; at += to[i++].t.n[0])
        kernels_cpu.copy(d, to[i].t, tensor_rows(all, at, to[i].t.n[0]));
    kernels_cpu.free(d, all.data);
    return true;
}

static inline struct kernels thread_kernels(bool late)
{
    struct kernels k = kernels_cpu;
    k.link_kind = thread_link_kind;
    k.link_name = thread_link_name;
    k.link = late ? thread_link_late : thread_link_early;
    k.unlink = thread_unlink;
    k.exchange = thread_exchange;
    k.link_check = thread_link_check;
    k.link_state = thread_link_state;
    k.link_export = thread_link_export;
    k.link_import = thread_link_import;
    k.link_forget = thread_link_forget;
    k.link_fetch = thread_link_fetch;
    k.link_fetched = thread_link_fetched;
    k.link_meet = thread_link_meet;
    k.link_attention = thread_link_attention;
    k.link_abort = thread_link_abort;
    return k;
}

#endif
