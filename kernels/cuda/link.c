// link.c: devices of several processes send each other rows: on one host by peers.c, else through NCCL's sends and
// receives. They are enough for
// every collective that worker/comm builds on them, and one communicator is enough for every group of ranks: between
// two ranks messages match in order, whatever group they belong to.
//
// The communicator does not block: each of its calls is asked until it is over, and may be given up from another
// thread, which is the only way out of a wait for a rank that is gone.
#include "kernels/cuda/peers.h"

#include <nccl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "proto/clock.h"

enum { NAMES = 4096 }; // exchanges that are remembered by name: more than a step has

_Static_assert(NCCL_UNIQUE_ID_BYTES <= LINK_NAME_BYTES, "NCCL's identifier is a link's name");

struct link {
    struct device *d;
    ncclComm_t comm;
    int rank, ranks;
    pthread_mutex_t lock;     // of comm: its calls, and its end
    atomic_bool given_up;     // an abort wants the lock
    bool aborted;             // under lock: comm is gone
    struct link_clock *clock; // in the device's memory
    struct link_mark *mark;   // in host memory that the device writes
    struct peers *peers;      // NULL: these ranks cannot be
    _Atomic(const char *) names[NAMES];
    atomic_uint_least64_t begun;
    uint64_t recording; // begun, where a recording began
};

struct link_round {
    uint64_t count;
    const char *names[];
};

// ---- who is linked

void cuda_host_of(char text[LINK_HOST])
{
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    text[0] = '\0';
    if (f && !fgets(text, LINK_HOST, f))
        text[0] = '\0';
    if (f)
        fclose(f);
    text[strcspn(text, "\n")] = '\0';
}

void cuda_link_kind(struct device *d, char *kind, char *place)
{
    struct cudaDeviceProp gpu;
    char host[LINK_HOST], bus[32] = "?";
    int driver = 0, nccl = 0;
    cuda_enter(d);
    if (cudaGetDeviceProperties(&gpu, d->gpu) != cudaSuccess)
        memset(&gpu, 0, sizeof gpu);
    cudaDriverGetVersion(&driver);
    ncclGetVersion(&nccl);
    cudaDeviceGetPCIBusId(bus, sizeof bus, d->gpu);
    cuda_host_of(host);
    snprintf(kind, LINK_KIND_BYTES, "%.60s with %d multiprocessors, CUDA driver %d, cuBLASLt %zu, cuDNN %zu, NCCL %d",
             gpu.name, d->processors, driver, cublasLtGetVersion(), cudnnGetVersion(), nccl);
    snprintf(place, LINK_KIND_BYTES, "GPU %s of host %s", bus, host);
}

int cuda_link_name(void *name, struct err *err)
{
    ncclUniqueId id;
    const ncclResult_t r = ncclGetUniqueId(&id);
    if (r != ncclSuccess)
        return err_set(err, ERR_UNAVAILABLE, "NCCL does not start: %s", ncclGetErrorString(r));
    memset(name, 0, LINK_NAME_BYTES);
    memcpy(name, &id, sizeof id);
    return 0;
}

// ---- calls that do not block

// The state of comm once its last call is over; ncclInProgress: given up, or the time is over. Holds the lock.
static ncclResult_t settle(struct link *l, ncclResult_t r, double until)
{
    while (r == ncclInProgress && !atomic_load(&l->given_up) && (until == 0 || monotonic_seconds() < until)) {
        const struct timespec pause = {.tv_nsec = 20000};
        if (until != 0)
            nanosleep(&pause, NULL);
        if (ncclCommGetAsyncError(l->comm, &r) != ncclSuccess)
            return ncclSystemError;
    }
    return r;
}

static const char *why(const struct link *l, ncclResult_t r)
{
    const char *last = l->comm ? ncclGetLastError(l->comm) : "";
    return last && *last ? last : ncclGetErrorString(r);
}

static int join(struct link *l, const void *name, int timeout_ms, struct err *err)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId id;
    config.blocking = 0;
    memcpy(&id, name, sizeof id);
    pthread_mutex_lock(&l->lock);
    const ncclResult_t r = settle(l, ncclCommInitRankConfig(&l->comm, l->ranks, id, l->rank, &config),
                                  monotonic_seconds() + timeout_ms / 1e3);
    pthread_mutex_unlock(&l->lock);
    if (r == ncclSuccess)
        return 0;
    if (r == ncclInProgress)
        return err_set(err, ERR_TIMEOUT, "linking the GPUs of %d ranks took more than %d ms", l->ranks, timeout_ms);
    return err_set(err, ERR_UNAVAILABLE,
                   "linking the GPUs of %d ranks: %s; NCCL_DEBUG=INFO tells what NCCL tried, ditfleet doctor what is "
                   "between the GPUs",
                   l->ranks, why(l, r));
}

int cuda_link(struct device *d, const void *name, int rank, int ranks, int timeout_ms, struct link **out,
              struct err *err)
{
    struct link *l = calloc(1, sizeof *l);
    *out = NULL;
    if (!l)
        return err_set(err, ERR_NO_MEMORY, "no memory for a link");
    *l = (struct link){.d = d, .rank = rank, .ranks = ranks};
    pthread_mutex_init(&l->lock, NULL);
    cuda_enter(d);
    int rc = 0;
    if (cudaHostAlloc((void **)&l->mark, sizeof *l->mark, cudaHostAllocMapped) != cudaSuccess ||
        cudaMalloc((void **)&l->clock, sizeof *l->clock) != cudaSuccess ||
        cudaMemsetAsync(l->clock, 0, sizeof *l->clock, d->stream) != cudaSuccess)
        rc = err_set(err, ERR_NO_MEMORY, "no memory on the GPU for a link");
    if (rc == 0) {
        memset((void *)l->mark, 0, sizeof *l->mark);
        rc = join(l, name, timeout_ms, err);
    }
    if (rc != 0) {
        cuda_unlink(l);
        return rc;
    }
    l->peers = peers_new(d, rank, ranks, l->clock, l->mark);
    d->link = l;
    *out = l;
    return 0;
}

void cuda_link_abort(struct link *l)
{
    atomic_store(&l->given_up, true);
    if (l->mark)
        l->mark->give_up = 1;
    pthread_mutex_lock(&l->lock);
    if (!l->aborted && l->comm)
        ncclCommAbort(l->comm);
    l->aborted = true;
    pthread_mutex_unlock(&l->lock);
}

void cuda_unlink(struct link *l)
{
    if (!l)
        return;
    cuda_enter(l->d);
    // Ranks leave at different times; an abort waits for nobody. What was exchanged is done, or its failure is known.
    cuda_link_abort(l);
    peers_free(l->peers);
    cudaFree(l->clock);
    cudaFreeHost((void *)l->mark);
    pthread_mutex_destroy(&l->lock);
    if (l->d->link == l)
        l->d->link = NULL;
    free(l);
}

// ---- exchanges

static bool contiguous(struct tensor t)
{
    return t.n[0] <= 1 || t.ld == tensor_count(t) / t.n[0];
}

static size_t room_of(struct tensor t)
{
    return (tensor_bytes(t) + 255) & ~(size_t)255;
}

// Scratch memory for the pieces that have gaps and go to another rank, or come from one.
static size_t scattered(const struct link *l, int n, const struct link_piece *pieces)
{
    size_t bytes = 0;
    for (int i = 0; i < n; i++)
        if (pieces[i].rank != l->rank && !contiguous(pieces[i].t))
            bytes += room_of(pieces[i].t);
    return bytes;
}

// Where piece i lies without gaps: in its place, or at *scratch, which moves on.
static void *gathered(const struct link_piece *p, char **scratch)
{
    if (contiguous(p->t))
        return p->t.data;
    void *at = *scratch;
    *scratch += room_of(p->t);
    return at;
}

static struct tensor without_gaps(struct tensor t, void *at)
{
    t.data = at;
    t.ld = t.n[0] > 0 ? tensor_count(t) / t.n[0] : t.ld;
    return t;
}

// To oneself: in order, as between others.
static void keep(struct link *l, int sends, const struct link_piece *send, int recvs, const struct link_piece *recv)
{
    for (int i = 0, j = 0; i < sends; i++) {
        if (send[i].rank != l->rank)
            continue;
        while (j < recvs && recv[j].rank != l->rank)
            j++;
        if (j == recvs)
            return;
        const struct tensor from = send[i].t, to = recv[j++].t;
        if (from.data != to.data && tensor_count(from) > 0)
            launch_copy(l->d->stream, to, from);
    }
}

// The messages of one exchange, as one group: none waits for another.
static ncclResult_t messages(struct link *l, int sends, const struct link_piece *send, int recvs,
                             const struct link_piece *recv, char *out, char *in)
{
    ncclResult_t r = ncclGroupStart();
    for (int i = 0; i < sends && r <= ncclSuccess; i++)
        if (send[i].rank != l->rank && tensor_count(send[i].t) > 0)
            r = ncclSend(gathered(&send[i], &out), tensor_bytes(send[i].t), ncclUint8, send[i].rank, l->comm,
                         l->d->stream);
    for (int i = 0; i < recvs && r <= ncclSuccess; i++)
        if (recv[i].rank != l->rank && tensor_count(recv[i].t) > 0)
            r = ncclRecv(gathered(&recv[i], &in), tensor_bytes(recv[i].t), ncclUint8, recv[i].rank, l->comm,
                         l->d->stream);
    const ncclResult_t end = ncclGroupEnd();
    return settle(l, r == ncclSuccess ? end : r, 0);
}

static void pack(struct link *l, int n, const struct link_piece *pieces, char *scratch, bool in)
{
    for (int i = 0; i < n; i++) {
        if (pieces[i].rank == l->rank || contiguous(pieces[i].t))
            continue;
        const struct tensor there = without_gaps(pieces[i].t, gathered(&pieces[i], &scratch));
        launch_copy(l->d->stream, in ? pieces[i].t : there, in ? there : pieces[i].t);
    }
}

static void through_nccl(struct link *l, const char *what, int sends, const struct link_piece *send, int recvs,
                         const struct link_piece *recv)
{
    struct device *d = l->d;
    const size_t out_bytes = scattered(l, sends, send), bytes = out_bytes + scattered(l, recvs, recv);
    char *out = bytes ? cuda_scratch(d, SLOT_LINK, bytes) : NULL, *in = out + out_bytes;
    if (bytes && !out)
        return;
    launch_link_mark(d->stream, l->clock, l->mark, false);
    keep(l, sends, send, recvs, recv);
    pack(l, sends, send, out, false);
    pthread_mutex_lock(&l->lock);
    const ncclResult_t r = l->aborted ? ncclSuccess : messages(l, sends, send, recvs, recv, out, in);
    if (r != ncclSuccess && r != ncclInProgress)
        check_fail(&d->check, ERR_UNAVAILABLE, "%s: NCCL failed: %s", what, why(l, r));
    pthread_mutex_unlock(&l->lock);
    pack(l, recvs, recv, in, true);
    launch_link_mark(d->stream, l->clock, l->mark, true);
}

// As cuda_enter; false: nothing goes on any more.
static bool enter(struct device *d, struct link *l)
{
    if (d->check.failure.code != 0 || atomic_load(&l->given_up))
        return false;
    cuda_enter(d);
    return true;
}

// One exchange more was queued.
static void begun(struct device *d, struct link *l, const char *what)
{
    const uint64_t number = atomic_load(&l->begun);
    atomic_store(&l->names[number % NAMES], what);
    atomic_store(&l->begun, number + 1);
    cuda_launched(d, what);
}

void cuda_exchange(struct device *d, struct link *l, const char *what, int sends, const struct link_piece *send,
                   int recvs, const struct link_piece *recv)
{
    if (!enter(d, l))
        return;
    if (peers_ready(l->peers))
        peers_exchange(l->peers, what, sends, send, recvs, recv);
    else
        through_nccl(l, what, sends, send, recvs, recv);
    begun(d, l, what);
}

// ---- memory that others write

void cuda_link_export(struct link *l, void *to)
{
    memset(to, 0, LINK_EXPORT_BYTES);
    if (l->peers)
        peers_export(l->peers, to);
}

bool cuda_link_import(struct link *l, const void *all)
{
    return l->peers && peers_import(l->peers, all);
}

void cuda_link_forget(struct link *l)
{
    if (l->peers)
        peers_forget(l->peers);
}

void cuda_link_fetch(struct device *d, struct link *l, int rank, const void *from, void *to, int64_t bytes,
                     bool at_once)
{
    if (!enter(d, l))
        return;
    peers_fetch(l->peers, rank, from, to, bytes, at_once);
}

void cuda_link_fetched(struct device *d, struct link *l, bool at_once)
{
    if (!enter(d, l))
        return;
    peers_fetched(l->peers, at_once);
}

void cuda_link_meet(struct device *d, struct link *l, int n, const int *ranks, bool beside)
{
    if (!enter(d, l))
        return;
    peers_meet(l->peers, n, ranks, beside);
    begun(d, l, "meeting");
}

bool cuda_link_attention(struct device *d, struct link *l, int n, const struct link_piece *to, struct tensor q,
                         struct tensor k, struct tensor v, const struct attention_opts *opts)
{
    struct attention_out out = {.n = n};
    if (!enter(d, l) || n > PEERS)
        return false;
    for (int i = 0; i < n; i++) {
        out.t[i] = to[i].t;
        out.t[i].data = peers_at(l->peers, to[i].rank, to[i].t.data);
        if (!out.t[i].data)
            return false;
    }
    return cuda_attention_out(d, &out, q, k, v, opts);
}

// ---- how far it is

int cuda_link_check(struct link *l, struct err *err)
{
    ncclResult_t r = ncclSuccess;
    if (pthread_mutex_trylock(&l->lock) != 0)
        return 0; // a call is under way, which finds out by itself
    if (!l->aborted && l->comm && ncclCommGetAsyncError(l->comm, &r) != ncclSuccess)
        r = ncclSystemError;
    int rc = 0;
    if (r != ncclSuccess && r != ncclInProgress)
        rc = err_set(err, ERR_UNAVAILABLE, "NCCL failed: %s", why(l, r));
    pthread_mutex_unlock(&l->lock);
    return rc;
}

void cuda_link_state(struct link *l, struct link_state *out)
{
    *out = (struct link_state){
        .done = l->mark->done, .seconds = (double)l->mark->busy_ns / 1e9, .waited = (double)l->mark->waited_ns / 1e9};
    out->begun = atomic_load(&l->begun);
    out->direct = peers_ready(l->peers);
    if (out->done < out->begun)
        out->what = atomic_load(&l->names[out->done % NAMES]);
}

// ---- recordings

void cuda_link_record(struct link *l)
{
    l->recording = atomic_load(&l->begun);
}

struct link_round *cuda_link_recorded(struct link *l)
{
    const uint64_t count = atomic_load(&l->begun) - l->recording;
    struct link_round *round = count ? malloc(sizeof *round + count * sizeof *round->names) : NULL;
    for (uint64_t i = 0; round && i < count; i++)
        round->names[i] = atomic_load(&l->names[(l->recording + i) % NAMES]);
    if (round)
        round->count = count;
    atomic_store(&l->begun, l->recording); // nothing ran yet
    return round;
}

void cuda_link_replay(struct link *l, const struct link_round *round)
{
    const uint64_t number = atomic_load(&l->begun);
    for (uint64_t i = 0; i < round->count; i++)
        atomic_store(&l->names[(number + i) % NAMES], round->names[i]);
    atomic_store(&l->begun, number + round->count);
}
