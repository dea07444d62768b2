#include "ops/cli/ranks.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SLAB_BYTES = 4 << 20 };

struct ranks {
    int count, region;
    int (*work)(void *arg, struct comm *comm, struct err *err);
    void *arg;
};

// The life of a forked rank; its exit status tells the leader's watcher.
static int child_main(const struct ranks *g, int rank, pid_t parent)
{
    struct err err = {.code = ERR_NONE};
    struct comm *comm;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        return 1;
    int rc = comm_shm_attach(g->region, rank, &comm, &err);
    if (rc == 0) {
        rc = g->work(g->arg, comm, &err);
        if (comm_check(comm, NULL) == 0) // what is refused is refused on all ranks: the leader knows
            rc = 0;
        comm_free(comm);
    }
    return rc != 0;
}

struct watcher {
    struct comm *comm;
    int expected; // children still to come
};

// A rank that dies would leave the others waiting for ever. Ranks are of this process group; what else a command has
// started is of another.
static void *watch_children(void *arg)
{
    struct watcher *w = arg;
    int status;
    for (; w->expected > 0; w->expected--) {
        pid_t pid = waitpid(0, &status, 0);
        if (pid < 0)
            break;
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            comm_abort(w->comm, "a rank process died");
    }
    return NULL;
}

static int lead(const struct ranks *g, struct err *err)
{
    struct comm *comm;
    pthread_t thread;
    TRY(comm_shm_attach(g->region, 0, &comm, err));
    struct watcher watcher = {comm, g->count - 1};
    const bool watching = pthread_create(&thread, NULL, watch_children, &watcher) == 0;
    const int rc = g->work(g->arg, comm, err);
    if (rc != 0)
        comm_abort(comm, err->text);
    if (watching)
        pthread_join(thread, NULL);
    comm_free(comm);
    return rc;
}

static int run_alone(const struct ranks *g, struct err *err)
{
    struct comm *comm;
    TRY(comm_self_new(&comm, err));
    const int rc = g->work(g->arg, comm, err);
    comm_free(comm);
    return rc;
}

int ranks_run(int ranks, int (*work)(void *arg, struct comm *comm, struct err *err), void *arg, struct err *err)
{
    struct ranks g = {.count = ranks, .work = work, .arg = arg};
    if (ranks == 1)
        return run_alone(&g, err);
    setenv("NCCL_NVLS_ENABLE", "0", 0); // of GPUs: nothing here needs NVLink's multicast
    g.region = comm_shm_region(ranks, SLAB_BYTES, err);
    if (g.region < 0)
        return err->code;
    const pid_t parent = getpid();
    for (int r = 1; r < ranks; r++) {
        const pid_t child = fork();
        if (child == 0)
            _exit(child_main(&g, r, parent));
        if (child < 0)
            return err_set(err, ERR_NO_MEMORY, "rank %d cannot be started", r);
    }
    const int rc = lead(&g, err);
    close(g.region);
    return rc;
}
