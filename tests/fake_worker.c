// A worker that computes nothing and misbehaves on request, for the supervisor's tests.
//
// $FAKE_DIR/GROUP holds "BEHAVIOUR [RANK]": what the rank (every rank, when none is named) does; the others, and all
// when there is no such file, are good: ready, then idle, then leave when told to drain.
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "proto/conf.h"
#include "proto/msg.h"
#include "proto/queue.h"
#include "worker/comm/comm.h"

struct fake {
    const char *config, *group, *rank, *ranks, *incarnation;
    int control, shm, meeting, listener; // 0: not given
    char behaviour[32];
    struct msg beat;
};

static void sleep_ms(int ms)
{
    const struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

static bool does(const struct fake *f, const char *behaviour)
{
    return strcmp(f->behaviour, behaviour) == 0;
}

static void say(const struct fake *f, const struct msg *m)
{
    struct err err = {0};
    if (msg_send(f->control, m, &err) == ERR_UNAVAILABLE)
        _exit(3);
}

static void leave(const struct fake *f, int status, const char *reason)
{
    struct msg bye = {.kind = MSG_BYE};
    snprintf(bye.reason, sizeof bye.reason, "%s", reason);
    say(f, &bye);
    _exit(status);
}

static void read_behaviour(struct fake *f)
{
    char path[300], rank[16] = "";
    snprintf(path, sizeof path, "%s/%s", getenv("FAKE_DIR") ? getenv("FAKE_DIR") : "/nonexistent", f->group);
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    if (fscanf(file, "%31s %15s", f->behaviour, rank) < 1 || (*rank && strcmp(rank, f->rank) != 0))
        strcpy(f->behaviour, "");
    fclose(file);
}

static int parse(struct fake *f, int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        const char **text = strcmp(name, "--config") == 0        ? &f->config
                            : strcmp(name, "--group") == 0       ? &f->group
                            : strcmp(name, "--rank") == 0        ? &f->rank
                            : strcmp(name, "--ranks") == 0       ? &f->ranks
                            : strcmp(name, "--incarnation") == 0 ? &f->incarnation
                                                                 : NULL;
        int *number = strcmp(name, "--control-fd") == 0   ? &f->control
                      : strcmp(name, "--shm-fd") == 0     ? &f->shm
                      : strcmp(name, "--meeting-fd") == 0 ? &f->meeting
                      : strcmp(name, "--listen-fd") == 0  ? &f->listener
                                                          : NULL;
        if (text)
            *text = value;
        else if (number)
            *number = atoi(value);
        else
            return -1;
    }
    const bool one_way = f->shm > 2 ? !f->meeting && !f->listener : f->meeting > 2 && f->listener > 2;
    return f->config && f->group && f->rank && f->ranks && f->incarnation && f->control > 2 && one_way ? 0 : -1;
}

// Of a group that spans nodes: where all ranks are called, this one among them, and the interface for NCCL.
static const char *check_meeting(const struct fake *f)
{
    struct comm_tcp_meeting where;
    struct sockaddr_in own;
    socklen_t n = sizeof own;
    char place[64];
    const char *interface = getenv("NCCL_SOCKET_IFNAME");
    if (pread(f->meeting, &where, sizeof where, 0) != (ssize_t)sizeof where || where.size != atoi(f->ranks) ||
        strlen(where.secret) != 24)
        return "the meeting is missing";
    if (getsockname(f->listener, (struct sockaddr *)&own, &n) != 0)
        return "nobody can call it";
    snprintf(place, sizeof place, "127.0.0.1:%d", ntohs(own.sin_port));
    if (strcmp(place, where.places[atoi(f->rank)]) != 0)
        return "it is called elsewhere";
    return interface && strcmp(interface, "=lo") == 0 ? NULL : "NCCL would choose an interface";
}

// What a worker must find: no descriptor but its own, its own process group, no blocked signal, a death signal.
static const char *check_surroundings(const struct fake *f)
{
    struct stat st;
    sigset_t blocked;
    int death = 0;
    DIR *fds = opendir("/proc/self/fd");
    for (struct dirent *e; fds && (e = readdir(fds));)
        if (*e->d_name != '.' && atoi(e->d_name) > (f->meeting ? 5 : 4) && atoi(e->d_name) != dirfd(fds))
            return "inherited a descriptor it must not have";
    if (fds)
        closedir(fds);
    if (f->meeting && check_meeting(f))
        return check_meeting(f);
    if (!f->meeting && (fstat(f->shm, &st) != 0 || st.st_size < 65536))
        return "the shared region is missing";
    if (getpgrp() != getpid())
        return "not in a process group of its own";
    if (sigprocmask(SIG_SETMASK, NULL, &blocked) != 0 || sigismember(&blocked, SIGTERM) ||
        sigismember(&blocked, SIGCHLD))
        return "started with signals blocked";
    if (prctl(PR_GET_PDEATHSIG, &death) != 0 || death != SIGKILL)
        return "would outlive its supervisor";
    const char *gpus = getenv("CUDA_VISIBLE_DEVICES"), *order = getenv("CUDA_DEVICE_ORDER");
    const bool has_gpu = strncmp(f->group, "gpu", 3) == 0; // "gpu3", "gpu4-6"
    char wanted[64];
    snprintf(wanted, sizeof wanted, "%s", has_gpu ? f->group + 3 : "");
    for (char *dash = wanted; (dash = strchr(dash, '-')) != NULL;)
        *dash = ',';
    if (getenv("NOTIFY_SOCKET"))
        return "has the wrong environment";
    if (has_gpu && (!gpus || strcmp(gpus, wanted) != 0 || !order || strcmp(order, "PCI_BUS_ID") != 0))
        return "does not see its GPU";
    return NULL;
}

// Claims one job in the group's name and holds it.
static void claim_job(struct fake *f)
{
    struct conf *conf = NULL;
    struct queue *q = NULL;
    struct queue_job job = {0};
    struct err err = {0};
    size_t count = 0;
    char id[CONF_WORKER_ID_BYTES], cursor[QUEUE_ENTRY_SIZE], pool[JOB_MODEL_SIZE];
    const char *pools[] = {pool};
    if (conf_load(f->config, &conf, &err) != 0 ||
        queue_open(&q, conf->redis.url, conf->redis.queue, QUEUE_NODE, NULL, &err) != 0)
        leave(f, 1, err.text);
    const struct conf_group *g = conf_group_find(conf, f->group);
    snprintf(pool, sizeof pool, "%s@%s", g->models[0].name, g->models[0].version);
    const struct queue_claim want = {.worker = conf_worker_id(conf, f->group, id),
                                     .incarnation = f->incarnation,
                                     .pools = pools,
                                     .n_pools = 1,
                                     .lease_ms = (uint64_t)(1000 * conf->queue.lease_s),
                                     .max = 1};
    if (queue_claim(q, &want, &job, &count, cursor, &err) != 0)
        leave(f, 1, err.text);
    if (count == 1) {
        snprintf(f->beat.job, sizeof f->beat.job, "%s", job.fence.id);
        f->beat.stage = STAGE_DENOISE;
        queue_job_free(&job);
    }
    queue_close(q);
    conf_free(conf);
}

// After READY: one beat and what the behaviour wants, every 50 ms.
static void live(struct fake *f)
{
    for (int round = 0;; round++) {
        struct msg m;
        struct err err = {0};
        if (does(f, "crash") && round == 4) {
            signal(SIGSEGV, SIG_DFL); // a sanitizer's handler would make it an exit
            raise(SIGSEGV);
        }
        if (does(f, "leave") && round == 4)
            leave(f, 0, "had enough");
        if (does(f, "garbage") && round == 4)
            send(f->control, "rubbish", 7, MSG_NOSIGNAL);
        if (does(f, "silent") && round == 4)
            raise(SIGSTOP);
        if (does(f, "hang") || does(f, "work"))
            f->beat.stage = STAGE_DENOISE, f->beat.step = 3, f->beat.steps = 20;
        if ((does(f, "claim") || does(f, "poisoned")) && !*f->beat.job && round % 4 == 0)
            claim_job(f);
        if (does(f, "poisoned") && *f->beat.job) {
            signal(SIGSEGV, SIG_DFL);
            raise(SIGSEGV);
        }
        f->beat.progress += does(f, "work") || does(f, "claim");
        say(f, &f->beat);
        sleep_ms(50);
        int rc = msg_receive(f->control, &m, &err);
        if (rc == ERR_UNAVAILABLE && !does(f, "stubborn"))
            _exit(3);
        if (rc == 0 && m.kind == MSG_DRAIN && !does(f, "stubborn"))
            leave(f, 0, "drained");
    }
}

int main(int argc, char **argv)
{
    struct fake f = {.control = -1, .shm = -1, .beat = {.kind = MSG_BEAT}};
    if (parse(&f, argc, argv) != 0)
        return EXIT_DO_NOT_RESTART;
    fcntl(f.control, F_SETFL, O_NONBLOCK);
    read_behaviour(&f);
    const char *wrong = check_surroundings(&f);
    if (wrong)
        leave(&f, EXIT_DO_NOT_RESTART, wrong);
    if (does(&f, "stubborn"))
        signal(SIGTERM, SIG_IGN);
    say(&f, &(struct msg){.kind = MSG_HELLO, .pid = getpid()});
    if (does(&f, "fatal"))
        leave(&f, EXIT_DO_NOT_RESTART, "the model is missing");
    if (does(&f, "late")) {
        sleep_ms(500);
        leave(&f, EXIT_DO_NOT_RESTART, "the others have another model");
    }
    if (does(&f, "early"))
        leave(&f, 1, "cannot load");
    f.beat.stage = does(&f, "never") ? STAGE_LOADING : STAGE_IDLE;
    if (!does(&f, "never"))
        say(&f, &(struct msg){.kind = MSG_READY});
    live(&f);
}
