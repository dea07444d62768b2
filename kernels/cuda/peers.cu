// peers.cu: one kernel is one exchange. A receiver first posts where each piece is to go on the sender's board, and a
// flag; the sender's blocks wait for the flag, write the rows there, over NVLink, and flag that they are done; the kernel
// ends when everything it was promised is here. So memory is written only when its owner has come to the exchange, and
// read only after it.
//
// A meeting is one warp that flags and waits: small, to find a place beside a kernel that fills the GPU.
//
// Flags are numbers of messages between two ranks, each way: they grow for ever, and need no reset.
#include "kernels/cuda/vec.cuh"

enum { THREADS = 512, LOOKS = 1024, WARP = 32 };

__device__ static unsigned long long now_ns()
{
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

__device__ static uint64_t acquire(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ static void release(uint64_t *p, uint64_t v)
{
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// False: given up.
__device__ static bool wait_for(const uint64_t *flag, uint64_t value, const link_mark *mark)
{
    for (unsigned i = 1; acquire(flag) < value; i++)
        if (i % LOOKS == 0 && mark->give_up)
            return false;
    return true;
}

__device__ static bool in(unsigned set, int rank) { return set >> rank & 1; }

// Where what comes is to go. One block.
__device__ static void post(const peer_exchange &x)
{
    for (int i = (int)threadIdx.x; i < x.recvs; i += THREADS) {
        const peer_recv &r = x.recv[i];
        volatile peer_mail *mail = &x.theirs[r.peer]->mail[x.rank][r.slot];
        mail->address = (uint64_t)r.to.at;
        mail->ld = r.to.ld;
        __threadfence_system();
    }
    __syncthreads();
    const int peer = (int)threadIdx.x;
    if (peer < x.ranks && in(x.from, peer))
        release(&x.theirs[peer]->ready[x.rank], x.counts->in[peer] + 1);
}

// A receiver's address as this process sees it; NULL: it is in none of its blocks.
__device__ static char *translated(const peer_exchange &x, int peer, uint64_t address)
{
    for (int i = 0; i < DEVICE_BLOCKS; i++) {
        const peer_map &m = x.map[peer * DEVICE_BLOCKS + i];
        if (address - m.base < m.bytes)
            return (char *)m.mapped + (address - m.base);
    }
    return nullptr;
}

__device__ static peer_rows target_of(const peer_exchange &x, const peer_send &s)
{
    if (s.to.at)
        return s.to;
    const volatile peer_mail *mail = &x.mine->mail[s.peer][s.slot];
    return {translated(x, s.peer, mail->address), (int64_t)mail->ld, s.from.rows, s.from.bytes};
}

// Bytes first.. of the rows, PEER_CHUNK at most.
template <typename U> __device__ static void copy_chunk(const peer_rows &to, const peer_rows &from, int64_t first)
{
    constexpr int N = (int)sizeof(U);
    const unsigned row = (unsigned)(from.bytes / N);
    const int64_t all = from.rows * from.bytes, rest = all - first;
    const unsigned n = (unsigned)((rest < PEER_CHUNK ? rest : PEER_CHUNK) / N);
    const int64_t start = first / N;
    const bool flat = from.rows == 1 || (to.ld == from.bytes && from.ld == from.bytes); // no gaps on either side
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        const int64_t at = start + i, r = flat ? 0 : (int64_t)((unsigned)at / row), c = flat ? at : (unsigned)at % row;
        *(U *)(to.at + r * to.ld + c * N) = *(const U *)(from.at + r * from.ld + c * N);
    }
}

__device__ static void copy(const peer_rows &to, const peer_rows &from, int64_t first)
{
    const uint64_t bits = (uint64_t)to.at | (uint64_t)from.at | (uint64_t)from.bytes |
                          (from.rows > 1 ? (uint64_t)to.ld | (uint64_t)from.ld : 0);
    if (bits % 16 == 0)
        copy_chunk<uint4>(to, from, first);
    else if (bits % 4 == 0)
        copy_chunk<uint32_t>(to, from, first);
    else
        copy_chunk<uint8_t>(to, from, first);
}

// What this rank sends, of all blocks. False: given up.
__device__ static bool send(const peer_exchange &x, unsigned *known)
{
    int i = 0;
    for (unsigned chunk = blockIdx.x; chunk < x.chunks; chunk += gridDim.x) {
        while (x.send[i].end <= chunk)
            i++;
        const peer_send &s = x.send[i];
        if (!s.to.at && !in(*known, s.peer)) {
            __syncthreads(); // nobody reads known any more
            if (threadIdx.x == 0)
                *known |= wait_for(&x.mine->ready[s.peer], x.counts->out[s.peer] + 1, x.mark) ? 1U << s.peer : 1U << 31;
            __syncthreads();
            if (in(*known, 31))
                return false;
        }
        const unsigned before = i ? x.send[i - 1].end : 0;
        const peer_rows to = target_of(x, s);
        if (to.at)
            copy(to, s.from, (int64_t)(chunk - before) * PEER_CHUNK);
    }
    return true;
}

// For the host to see.
__device__ static void one_more(link_clock *clock, link_mark *mark)
{
    clock->done++;
    mark->busy_ns = clock->busy_ns;
    mark->waited_ns = clock->waited_ns;
    __threadfence_system();
    mark->done = clock->done;
}

// The last block of all: tells the others, and waits for what comes.
__device__ static void finish(const peer_exchange &x, bool fine)
{
    const int peer = (int)threadIdx.x;
    if (fine && peer < x.ranks) {
        if (in(x.to, peer)) {
            release(&x.theirs[peer]->done[x.rank], x.counts->out[peer] + 1);
            x.counts->out[peer]++;
        }
        if (in(x.from, peer)) {
            wait_for(&x.mine->done[peer], x.counts->in[peer] + 1, x.mark);
            x.counts->in[peer]++;
        }
    }
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    x.counts->finished = 0;
    x.clock->busy_ns += now_ns() - x.clock->began_ns;
    one_more(x.clock, x.mark);
}

__global__ static void __launch_bounds__(THREADS) exchange_kernel(const __grid_constant__ peer_exchange x)
{
    __shared__ unsigned known; // peers that have come
    __shared__ bool last;
    if (threadIdx.x == 0)
        known = 0;
    __syncthreads();
    if (blockIdx.x == 0) { // also sees how long the others let it wait
        const unsigned long long began = now_ns();
        post(x);
        const int peer = (int)threadIdx.x;
        if (peer < x.ranks && in(x.to, peer))
            wait_for(&x.mine->ready[peer], x.counts->out[peer] + 1, x.mark);
        __syncthreads();
        if (threadIdx.x == 0) {
            x.clock->began_ns = began;
            x.clock->waited_ns += now_ns() - began;
        }
    }
    const bool fine = send(x, &known);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system(); // the block's rows, before anybody is told
        last = atomicAdd(&x.counts->finished, 1U) == gridDim.x - 1;
        __threadfence_system();
    }
    __syncthreads();
    if (last)
        finish(x, fine);
}

__global__ static void __launch_bounds__(WARP) meeting_kernel(const __grid_constant__ peer_meeting x)
{
    const unsigned long long began = now_ns();
    const int peer = (int)threadIdx.x;
    if (in(x.with, peer)) {
        __threadfence_system();
        release(&x.theirs[peer]->done[x.rank], ++x.counts->out[peer]);
        wait_for(&x.mine->done[peer], ++x.counts->in[peer], x.mark);
    }
    __syncwarp();
    if (threadIdx.x != 0)
        return;
    const unsigned long long took = x.beside ? 0 : now_ns() - began;
    x.clock->busy_ns += took;
    x.clock->waited_ns += took;
    one_more(x.clock, x.mark);
}

void launch_peer_meeting(cudaStream_t s, const struct peer_meeting *m) { meeting_kernel<<<1, WARP, 0, s>>>(*m); }

void launch_peer_exchange(cudaStream_t s, const struct peer_exchange *x, int processors)
{
    const unsigned most = 2 * (unsigned)processors, blocks = x->chunks < most ? x->chunks : most;
    exchange_kernel<<<blocks ? blocks : 1, THREADS, 0, s>>>(*x);
}
