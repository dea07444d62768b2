// bench_peer.c: the peer's process. It says what it is in a line of JSON once it is warm, then answers each line "run"
// with the times of one loop, and ends when its input does: so both sides run in turns on one machine, warm.
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ops/cli/bench.h"
#include "worker/sampler.h"

enum { PATIENCE = 1200, ENDING = 5 }; // seconds; compiling takes minutes
enum { MAX_RUNS = BENCH_MAX_REPEAT };

struct peer {
    pid_t pid;
    FILE *to, *from;
    int errors; // its stderr
    double steps[MAX_RUNS * SAMPLER_MAX_STEPS], loops[MAX_RUNS];
    int n_steps, n_loops;
};

// tests/bench/reference_gpu.py in start or a directory above it.
static bool look_above(const char *start, char path[PATH_MAX])
{
    char dir[PATH_MAX];
    snprintf(dir, sizeof dir, "%s", start);
    for (;;) {
        if (snprintf(path, PATH_MAX, "%s/tests/bench/reference_gpu.py", dir) < PATH_MAX && access(path, R_OK) == 0)
            return true;
        char *slash = strrchr(dir, '/');
        if (!slash)
            return false;
        *slash = '\0';
    }
}

static bool find_script(const struct bench *b, char path[PATH_MAX])
{
    char here[PATH_MAX];
    if (b->peer_script) {
        snprintf(path, PATH_MAX, "%s", b->peer_script);
        return access(path, R_OK) == 0;
    }
    const ssize_t n = readlink("/proc/self/exe", here, sizeof here - 1);
    here[n > 0 ? n : 0] = '\0';
    return (n > 0 && look_above(here, path)) || (getcwd(here, sizeof here) && look_above(here, path));
}

// What the peer is told of the run, made before the fork: other threads may hold locks of the library at that moment.
struct told {
    char width[16], height[16], steps[16], text[16], ranks[16], config[PATH_MAX];
};

static void tell(const struct bench *b, struct told *t)
{
    const Ditfleet__V1__Job *j = b->job;
    snprintf(t->width, sizeof t->width, "%u", j->width);
    snprintf(t->height, sizeof t->height, "%u", j->height);
    snprintf(t->steps, sizeof t->steps, "%u", j->num_inference_steps);
    snprintf(t->text, sizeof t->text, "%u", j->max_sequence_length);
    snprintf(t->ranks, sizeof t->ranks, "%d", b->ranks);
    snprintf(t->config, sizeof t->config, "%s/transformer/config.json", b->architecture ? b->directory : b->model_dir);
}

static void start_python(const struct bench *b, const struct told *t, const char *script, int in, int out, int errors)
{
    static const char none[] = "{\"missing\": \"there is no python3\"}\n";
    setpgid(0, 0); // whoever waits for the ranks (ranks.c) is not to get it
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    dup2(in, 0);
    dup2(out, 1);
    dup2(errors, 2);
    execlp("python3", "python3", script, "--config", t->config, "--width", t->width, "--height", t->height, "--steps",
           t->steps, "--text-tokens", t->text, "--ranks", t->ranks, "--precision", precision_name(&b->precision),
           "--device", b->device, (char *)NULL);
    _exit(write(1, none, sizeof none - 1) > 0 ? CLI_FAILED : CLI_UNAVAILABLE);
}

// One line of JSON from the peer; NULL: it ended, or took too long.
static json_t *answer(struct peer *p)
{
    char line[1 << 16];
    struct pollfd ready = {.fd = fileno(p->from), .events = POLLIN};
    for (;;) {
        if (poll(&ready, 1, PATIENCE * 1000) <= 0 || !fgets(line, sizeof line, p->from))
            return NULL;
        if (line[0] == '{') // libraries print what they like
            return json_loads(line, 0, NULL);
    }
}

// The end of what it wrote to stderr.
static void last_words(const struct peer *p, char *text, size_t size)
{
    const off_t end = lseek(p->errors, 0, SEEK_END), from = end > 300 ? end - 300 : 0;
    const ssize_t n = pread(p->errors, text, size - 1 < 300 ? size - 1 : 300, from);
    text[n > 0 ? n : 0] = '\0';
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ')
            *c = ' ';
}

// Pipes and process; what was opened is closed by bench_peer_end.
static int launch(struct bench *b, const char *script, struct err *err)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1};
    struct told told;
    struct peer *p = calloc(1, sizeof *p);
    if (!p)
        return err_set(err, ERR_NO_MEMORY, "no memory for the peer");
    b->peer = p;
    tell(b, &told);
    p->pid = -1;
    p->errors = memfd_create("peer's errors", MFD_CLOEXEC);
    if (p->errors >= 0 && pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0) {
        p->to = fdopen(in[1], "w");
        p->from = fdopen(out[0], "r");
        p->pid = p->to && p->from ? fork() : -1;
    }
    if (p->pid == 0)
        start_python(b, &told, script, in[0], out[1], p->errors);
    const int why = errno;
    if (p->pid > 0)
        setpgid(p->pid, p->pid); // or by itself, whoever comes first
    close(in[0]);
    close(out[1]);
    if (p->pid < 0)
        return err_set(err, ERR_IO, "the peer cannot be started (%s)", strerror(why));
    setvbuf(p->from, NULL, _IONBF, 0); // so that poll sees all that is there
    return 0;
}

int bench_peer_start(struct bench *b, struct err *err)
{
    struct bench_peer *r = &b->peer_result;
    char script[PATH_MAX], words[320];
    if (!find_script(b, script)) {
        if (b->peer_script)
            return err_set(err, ERR_INVALID, "--peer %.200s: cannot be read", b->peer_script);
        snprintf(r->missing, sizeof r->missing,
                 "tests/bench/reference_gpu.py is not found beside the source tree; say "
                 "where it is by --peer SCRIPT");
        return 0;
    }
    signal(SIGPIPE, SIG_IGN); // a peer that ended is seen by its silence
    TRY(launch(b, script, err));
    json_t *hello = answer(b->peer);
    const char *name = json_string_value(json_object_get(hello, "name"));
    const char *missing = json_string_value(json_object_get(hello, "missing"));
    last_words(b->peer, words, sizeof words);
    if (name)
        snprintf(r->name, sizeof r->name, "%s", name);
    else
        snprintf(r->missing, sizeof r->missing, "%s", missing ? missing : *words ? words : "it ended without a word");
    if (!name)
        bench_peer_end(b);
    json_decref(hello);
    return 0;
}

int bench_peer_run(struct bench *b, struct err *err)
{
    struct peer *p = b->peer;
    char words[320];
    size_t i;
    json_t *v;
    fprintf(p->to, "run\n");
    fflush(p->to);
    json_t *reply = answer(p), *steps = json_object_get(reply, "step_ms");
    if (!json_is_array(steps) || p->n_loops == MAX_RUNS) {
        last_words(p, words, sizeof words);
        json_decref(reply);
        return err_set(err, ERR_UNAVAILABLE, "the peer gave no times: %.300s", words);
    }
    json_array_foreach(steps, i, v) if (p->n_steps < (int)(sizeof p->steps / sizeof *p->steps)) p->steps[p->n_steps++] =
        json_number_value(v);
    p->loops[p->n_loops++] = json_number_value(json_object_get(reply, "loop_s"));
    json_decref(reply);
    return 0;
}

// Its ranks may hold each other up as they end: it has a while for it.
static void stop(pid_t pid)
{
    const struct timespec tick = {.tv_nsec = 10 * 1000 * 1000};
    kill(pid, SIGTERM);
    for (int i = 0; i < ENDING * 100; i++) {
        if (waitpid(pid, NULL, WNOHANG) != 0)
            return;
        nanosleep(&tick, NULL);
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

void bench_peer_end(struct bench *b)
{
    struct peer *p = b->peer;
    if (!p)
        return;
    b->peer_result.step = bench_spread_of(p->steps, p->n_steps);
    b->peer_result.loop = bench_spread_of(p->loops, p->n_loops).median;
    if (p->to)
        fclose(p->to);
    if (p->from)
        fclose(p->from);
    if (p->pid > 0)
        stop(p->pid);
    if (p->errors >= 0)
        close(p->errors);
    free(p);
    b->peer = NULL;
}
