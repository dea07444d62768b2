// test_upload.c: deliveries against real hosts: ditfleet-sink with its faults, and a canned server that keeps what it
// was sent. Every wait is short, so the whole program takes a few seconds.
#include "worker/output/upload.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const struct upload_options quick = {
    .attempts = 4,
    .backoff_base_seconds = 0.01,
    .backoff_cap_seconds = 0.05,
    .connect_timeout_seconds = 1,
    .stall_seconds = 5,
    .total_timeout_seconds = 3,
};
static const struct upload_policy closed; // the default: nothing is allowed

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// ---- fixtures: a directory a test, a sink in it

struct place {
    char dir[64];
    pid_t sink;
    unsigned port;
    char host[32]; // "127.0.0.1:PORT"
    const char *allow[1];
    const char *roots[1];
    struct upload_policy policy; // allows the sink and DIR/root
};

static void read_text(const char *dir, const char *name, char *out, size_t room)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    out[0] = 0;
    FILE *f = fopen(path, "re");
    if (!f)
        return;
    out[fread(out, 1, room - 1, f)] = 0;
    fclose(f);
}

static void place_open(struct place *p)
{
    *p = (struct place){.dir = "/tmp/ditfleet-upload-XXXXXX"};
    char path[128];
    assert_non_null(mkdtemp(p->dir));
    snprintf(path, sizeof path, "%s/root", p->dir);
    assert_int_equal(mkdir(path, 0755), 0);
    p->roots[0] = strdup(path);
    p->allow[0] = p->host;
    p->policy =
        (struct upload_policy){.allow_hosts = p->allow, .n_allow_hosts = 1, .file_roots = p->roots, .n_file_roots = 1};
    snprintf(p->host, sizeof p->host, "127.0.0.1:9");
}

// Starts ditfleet-sink with up to six more arguments and waits until it listens.
static void place_sink(struct place *p, const char *const *more)
{
    char program[512], files[128], port_file[128], count_file[128], text[16];
    const char *build = getenv("DITFLEET_BUILD");
    assert_non_null(build);
    place_open(p);
    snprintf(program, sizeof program, "%s/ditfleet-sink", build);
    snprintf(files, sizeof files, "%s", p->roots[0]);
    snprintf(port_file, sizeof port_file, "%s/port", p->dir);
    snprintf(count_file, sizeof count_file, "%s/count", p->dir);
    const char *argv[16] = {program, "--dir", files, "--port-file", port_file, "--count-file", count_file};
    for (int i = 0; more && more[i]; i++)
        argv[7 + i] = more[i];
    p->sink = fork();
    if (p->sink == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
        dup2(null, 2);
        execv(program, (char *const *)argv);
        _exit(127);
    }
    for (double end = now_seconds() + 5; !p->port && now_seconds() < end; usleep(2000)) {
        read_text(p->dir, "port", text, sizeof text);
        p->port = (unsigned)atoi(text);
    }
    assert_int_not_equal(p->port, 0);
    snprintf(p->host, sizeof p->host, "127.0.0.1:%u", p->port);
}

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static void place_close(struct place *p)
{
    if (p->sink > 0) {
        int status;
        kill(p->sink, SIGTERM);
        assert_int_equal(waitpid(p->sink, &status, 0), p->sink);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    nftw(p->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    free((char *)p->roots[0]);
}

// How many PUTs the sink saw of path.
static unsigned puts_of(const struct place *p, const char *path)
{
    char text[1024], name[256];
    unsigned n = 0;
    read_text(p->dir, "count", text, sizeof text);
    for (char *save = NULL, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        unsigned k;
        if (sscanf(line, "%u %255[^\n]", &k, name) == 2 && strcmp(name, path) == 0)
            n = k;
    }
    return n;
}

// ---- one delivery

struct outcome {
    int code;
    struct err err;
    struct upload_result result;
};

static const char picture[] = "these bytes stand for a picture";

// The secrets of all tests here; none may be in a log line.
static const char *const secrets[] = {"0123456789", "5ec2e7", "s3cr3t", "topsecret", "deadbeef", "hunter2pass"};

static void check_log(int fd, bool written)
{
    char text[4096] = "";
    assert_true(pread(fd, text, sizeof text - 1, 0) > 0 || !written);
    for (size_t i = 0; i < sizeof secrets / sizeof *secrets; i++)
        assert_null(strstr(text, secrets[i]));
    close(fd);
}

static struct outcome put(const struct upload_policy *policy, const struct upload_options *options,
                          Ditfleet__V1__Output *output, upload_stop *stop, void *context)
{
    struct outcome o = {0};
    struct log log = {.fd = memfd_create("log", MFD_CLOEXEC), .prog = "test", .rank = -1};
    struct uploader *u = uploader_new(policy, options, &log, &o.err);
    assert_non_null(u);
    uploader_seed(u, 7);
    o.code = uploader_put(u, output, "job/1 a", 3, 2, picture, sizeof picture, stop, context, &o.result, &o.err);
    assert_int_equal(o.code, o.err.code);
    assert_true((o.code == 0) == (o.result.location != NULL));
    uploader_free(u);
    check_log(log.fd, o.result.tries > 1 || o.code == 0);
    return o;
}

static struct outcome put_url(const struct upload_policy *policy, const struct upload_options *options, const char *url)
{
    Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
    output.url = (char *)url;
    struct outcome o = put(policy, options, &output, NULL, NULL);
    free(o.result.location);
    o.result.location = NULL;
    return o;
}

static struct outcome put_to_sink(const struct place *p, const struct upload_options *options)
{
    char url[128];
    snprintf(url, sizeof url, "http://%s/x.png", p->host);
    return put_url(&p->policy, options, url);
}

// ---- a host that answers one connection with a fixed text and keeps the request

struct canned {
    int listener;
    pthread_t thread;
    const char *answer;
    const char *endless; // NULL, or what follows it again and again, until nobody listens
    size_t followed;     // how many bytes of it
    char host[32];
    char request[8192];
};

static void *serve_canned(void *context)
{
    struct canned *c = context;
    struct pollfd ready = {.fd = c->listener, .events = POLLIN};
    if (poll(&ready, 1, 3000) != 1)
        return NULL;
    int fd = accept4(c->listener, NULL, NULL, SOCK_CLOEXEC);
    size_t n = 0;
    for (ssize_t got = 1; got > 0 && !memmem(c->request, n, picture, sizeof picture); n += got > 0 ? (size_t)got : 0)
        got = read(fd, c->request + n, sizeof c->request - 1 - n);
    assert_int_equal(write(fd, c->answer, strlen(c->answer)), strlen(c->answer));
    for (ssize_t put = 1;
         c->endless && put > 0 && c->followed<(size_t)10 << 30; c->followed += put> 0 ? (size_t)put : 0)
        put = send(fd, c->endless, strlen(c->endless), MSG_NOSIGNAL);
    shutdown(fd, SHUT_WR);
    while (read(fd, &(char[64]){0}, 64) > 0)
        ;
    close(fd);
    return NULL;
}

static int bind_loopback(char host[32])
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, len), 0);
    getsockname(fd, (struct sockaddr *)&a, &len);
    snprintf(host, 32, "127.0.0.1:%u", ntohs(a.sin_port));
    return fd;
}

static void canned_start_endless(struct canned *c, const char *answer, const char *endless)
{
    *c = (struct canned){.answer = answer, .endless = endless};
    c->listener = bind_loopback(c->host);
    assert_int_equal(listen(c->listener, 4), 0);
    assert_int_equal(pthread_create(&c->thread, NULL, serve_canned, c), 0);
}

static void canned_start(struct canned *c, const char *answer)
{
    canned_start_endless(c, answer, NULL);
}

static void canned_stop(struct canned *c)
{
    pthread_join(c->thread, NULL);
    close(c->listener);
}

// ---- HTTP

static void test_template(void **state)
{
    (void)state;
    char *out;
    assert_int_equal(target_expand("http://h/{id}/{attempt}-{index}.png?x={id}", "j", 3, 7, &out, NULL), 0);
    assert_string_equal(out, "http://h/j/3-7.png?x=j");
    free(out);
}

static void test_success(void **state)
{
    (void)state;
    struct place p;
    place_sink(&p, NULL);
    char url[128], expected[128], body[128];
    snprintf(url, sizeof url, "http://%s/out/{id}/{attempt}-{index}.png?signature=0123456789", p.host);
    snprintf(expected, sizeof expected, "http://%s/out/job%%2F1%%20a/3-2.png", p.host);
    Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
    output.url = url;
    struct outcome o = put(&p.policy, &quick, &output, NULL, NULL);
    assert_int_equal(o.code, 0);
    assert_string_equal(o.result.location, expected);
    assert_int_equal(o.result.tries, 1);
    assert_int_equal(o.result.status, 201);
    free(o.result.location);
    read_text(p.roots[0], "out/job/1 a/3-2.png", body, sizeof body);
    assert_string_equal(body, picture);
    place_close(&p);
}

static void test_request(void **state)
{
    (void)state;
    struct canned c;
    canned_start(&c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    const char *allow[] = {c.host};
    struct upload_policy policy = {.allow_hosts = allow, .n_allow_hosts = 1};
    char url[128], length[64];
    snprintf(url, sizeof url, "http://%s/a/../b?X-Amz-Signature=5ec2e7#here", c.host);
    Ditfleet__V1__Header token = DITFLEET__V1__HEADER__INIT, empty = DITFLEET__V1__HEADER__INIT;
    token.name = "x-token";
    token.value = "s3cr3t value";
    empty.name = "x-empty";
    Ditfleet__V1__Header *headers[] = {&token, &empty};
    Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
    output.url = url;
    output.headers = headers;
    output.n_headers = 2;
    struct outcome o = put(&policy, &quick, &output, NULL, NULL);
    canned_stop(&c);
    assert_int_equal(o.code, 0);
    free(o.result.location);
    snprintf(length, sizeof length, "\r\nContent-Length: %zu\r\n", sizeof picture);
    assert_ptr_equal(strstr(c.request, "PUT /a/../b?X-Amz-Signature=5ec2e7 HTTP/1.1\r\n"), c.request);
    assert_non_null(strstr(c.request, "\r\nContent-Type: image/png\r\n"));
    assert_non_null(strstr(c.request, "\r\nx-token: s3cr3t value\r\n"));
    assert_non_null(strcasestr(c.request, "\r\nx-empty:\r\n"));
    assert_non_null(strstr(c.request, length));
    assert_null(strcasestr(c.request, "expect"));
    assert_null(strcasestr(c.request, "x-www-form"));
}

static void test_retries(void **state)
{
    (void)state;
    struct place p;
    place_sink(&p, (const char *const[]){"--fail", "500", "--fail-count", "2", NULL});
    struct outcome o = put_to_sink(&p, &quick);
    assert_int_equal(o.code, 0);
    assert_int_equal(o.result.tries, 3);
    assert_int_equal(puts_of(&p, "x.png"), 3);
    place_close(&p);

    place_sink(&p, (const char *const[]){"--fail", "503", NULL});
    o = put_to_sink(&p, &quick);
    assert_int_equal(o.code, ERR_UNAVAILABLE);
    assert_true(o.err.retryable);
    assert_int_equal(o.result.tries, 4);
    assert_non_null(strstr(o.err.text, "503"));
    assert_non_null(strstr(o.err.text, "4 tries"));
    place_close(&p);

    place_sink(&p, (const char *const[]){"--fail", "refuse", "--fail-count", "1", NULL});
    assert_int_equal(put_to_sink(&p, &quick).code, 0);
    place_close(&p);

    place_sink(&p, (const char *const[]){"--fail", "slow", "--delay", "0.2", NULL});
    o = put_to_sink(&p, &quick);
    assert_int_equal(o.code, 0);
    assert_true(o.result.seconds > 0.19);
    place_close(&p);
}

static void test_retry_after(void **state)
{
    (void)state;
    struct place p;
    place_sink(&p, (const char *const[]){"--fail", "429", "--fail-count", "1", "--retry-after", "1", NULL});
    struct outcome o = put_to_sink(&p, &quick);
    assert_int_equal(o.code, 0);
    assert_int_equal(o.result.tries, 2);
    assert_true(o.result.seconds >= 1 && o.result.seconds < 2);
    place_close(&p);

    // A date past the deadline: no point in waiting.
    place_sink(&p, (const char *const[]){"--fail", "503", "--retry-after", "Wed, 01 Jan 2098 00:00:00 GMT", NULL});
    o = put_to_sink(&p, &quick);
    assert_int_equal(o.code, ERR_UNAVAILABLE);
    assert_int_equal(o.result.tries, 1);
    assert_true(o.result.seconds < 1);
    assert_non_null(strstr(o.err.text, "limit of 3 s"));
    place_close(&p);
}

static void test_final_statuses(void **state)
{
    (void)state;
    static const char *const statuses[] = {"403", "404", "302"};
    for (size_t i = 0; i < 3; i++) {
        struct place p;
        place_sink(&p, (const char *const[]){"--fail", statuses[i], NULL});
        struct outcome o = put_to_sink(&p, &quick);
        assert_int_equal(o.code, ERR_UPLOAD);
        assert_false(o.err.retryable);
        assert_int_equal(o.result.tries, 1);
        assert_non_null(strstr(o.err.text, statuses[i]));
        assert_int_equal(puts_of(&p, "x.png"), 1);
        assert_int_equal(puts_of(&p, "redirected"), 0);
        place_close(&p);
    }
    struct place p;
    place_sink(&p, (const char *const[]){"--max-bytes", "10", NULL});
    struct outcome o = put_to_sink(&p, &quick);
    assert_int_equal(o.code, ERR_UPLOAD);
    assert_non_null(strstr(o.err.text, "answered 413: the body is larger"));
    place_close(&p);
}

static void test_refused_port(void **state)
{
    (void)state;
    struct canned c = {0};
    int fd = bind_loopback(c.host); // bound, so nobody else has it, but not listening
    const char *allow[] = {c.host};
    struct upload_policy policy = {.allow_hosts = allow, .n_allow_hosts = 1};
    char url[128];
    snprintf(url, sizeof url, "http://%s/x", c.host);
    struct outcome o = put_url(&policy, &quick, url);
    close(fd);
    assert_int_equal(o.code, ERR_UNAVAILABLE);
    assert_int_equal(o.result.tries, 4);
    assert_non_null(strstr(o.err.text, "refused"));
}

static void test_hang(void **state)
{
    (void)state;
    struct place p;
    struct upload_options o = quick;
    o.total_timeout_seconds = 0.3;
    place_sink(&p, (const char *const[]){"--fail", "hang", "--fail-count", "2", NULL});
    struct outcome hung = put_to_sink(&p, &o);
    assert_int_equal(hung.code, ERR_TIMEOUT);
    assert_true(hung.err.retryable);
    assert_true(hung.result.seconds < 1);
    // The second hangs too, is given up by the stall limit, and the third try goes through.
    o = quick;
    o.stall_seconds = 0.2;
    hung = put_to_sink(&p, &o);
    assert_int_equal(hung.code, 0);
    assert_int_equal(hung.result.tries, 2);
    place_close(&p);
}

static int stop_second(void *context, struct err *e)
{
    int *asked = context;
    return ++*asked < 2 ? 0 : err_set(e, ERR_STALE, "the fence is somebody else's");
}

static void test_stop(void **state)
{
    (void)state;
    struct place p;
    static const char *const faults[] = {"500", "hang"}; // before the second try; in the middle of the first
    for (size_t i = 0; i < 2; i++) {
        place_sink(&p, (const char *const[]){"--fail", faults[i], NULL});
        char url[128];
        snprintf(url, sizeof url, "http://%s/x.png", p.host);
        Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
        output.url = url;
        int asked = 0;
        struct outcome o = put(&p.policy, &quick, &output, stop_second, &asked);
        assert_int_equal(o.code, ERR_STALE);
        assert_int_equal(o.result.tries, 1);
        assert_string_equal(o.err.text, "the fence is somebody else's");
        assert_int_equal(puts_of(&p, "x.png"), 1);
        place_close(&p);
    }
}

// Hosts that never stop talking, in the body or in the headers: little of it is read.
static void test_endless_answers(void **state)
{
    (void)state;
    static const char *const answers[][2] = {
        {"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n",
         "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"},
        {"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", "20\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n"},
        {"HTTP/1.1 200 OK\r\n", "X-More: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n"},
    };
    static const int codes[] = {0, ERR_UNAVAILABLE, ERR_UNAVAILABLE};
    struct upload_options once = quick;
    once.attempts = 1;
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        struct canned c;
        struct place p;
        place_open(&p);
        canned_start_endless(&c, answers[i][0], answers[i][1]);
        memcpy(p.host, c.host, sizeof p.host);
        struct outcome o = put_to_sink(&p, &once);
        canned_stop(&c);
        if (o.code != codes[i] || c.followed > (size_t)16 << 20)
            fail_msg("answer %zu: code %d, %zu bytes: %s", i, o.code, c.followed, o.err.text);
        place_close(&p);
    }
}

// ---- policy

// A name server that changes its mind. What libcurl calls is found here first: rebind.test is public when it is asked
// about for the first time and this host later on; both.test is both at once. Nothing listens at the public address.
static int (*real_getaddrinfo)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
static int (*real_connect)(int, const struct sockaddr *, socklen_t);
static atomic_int times_resolved, times_connected;
static const char public_address[] = "8.8.8.8";

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **out)
{
    *(void **)&real_getaddrinfo = dlsym(RTLD_NEXT, "getaddrinfo");
    const bool rebind = name && strcmp(name, "rebind.test") == 0, both = name && strcmp(name, "both.test") == 0;
    if (!rebind && !both)
        return real_getaddrinfo(name, service, hints, out);
    const bool first = atomic_fetch_add(&times_resolved, 1) == 0;
    struct addrinfo *second = NULL;
    int rc = real_getaddrinfo(both || first ? public_address : "127.0.0.1", service, hints, out);
    if (rc == 0 && both && real_getaddrinfo("127.0.0.1", service, hints, &second) == 0) {
        struct addrinfo *last = *out;
        while (last->ai_next)
            last = last->ai_next;
        last->ai_next = second;
    }
    return rc;
}

int connect(int fd, __CONST_SOCKADDR_ARG address, socklen_t length) // as glibc declares it
{
    *(void **)&real_connect = dlsym(RTLD_NEXT, "connect");
    struct sockaddr_in in = {0};
    char text[INET_ADDRSTRLEN] = "";
    memcpy(&in, address.__sockaddr__, length < sizeof in ? length : sizeof in);
    if (in.sin_family == AF_INET && strcmp(inet_ntop(AF_INET, &in.sin_addr, text, sizeof text), public_address) == 0) {
        atomic_fetch_add(&times_connected, 1);
        errno = ECONNREFUSED;
        return -1;
    }
    return real_connect(fd, address.__sockaddr__, length);
}

static void test_rebinding(void **state)
{
    (void)state;
    struct place p;
    char url[128];
    place_sink(&p, NULL);
    snprintf(url, sizeof url, "http://rebind.test:%u/x.png", p.port);
    atomic_store(&times_resolved, 0);
    assert_int_equal(put_url(&p.policy, &quick, url).code, ERR_UNAVAILABLE); // was public, and nobody was there
    assert_true(atomic_load(&times_connected) > 0);
    struct outcome o = put_url(&p.policy, &quick, url);
    assert_true(atomic_load(&times_resolved) > 1);
    assert_int_equal(o.code, ERR_REFUSED);
    assert_non_null(strstr(o.err.text, "127.0.0.1 is loopback"));
    snprintf(url, sizeof url, "http://both.test:%u/x.png", p.port);
    atomic_store(&times_connected, 0);
    assert_int_not_equal(put_url(&p.policy, &quick, url).code, 0);
    assert_true(atomic_load(&times_connected) > 0);
    assert_int_equal(puts_of(&p, "x.png"), 0); // never
    place_close(&p);
}

static void test_default_policy(void **state)
{
    (void)state;
    static const char *const hosts[] = {
        "127.0.0.1",
        "127.9.9.9",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "0",
        "192.0.0.8",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[fc00::1]",
        "[fd12::1]",
        "[fe80::1]",
        "[ff02::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:8.8.8.8]",
        "[64:ff9b::a00:1]",
        "[2002:7f00:1::]",
        "[2001::1]",
        "[2001:db8::1]",
        "[::127.0.0.1]",
        "localhost",
    };
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
        char url[128];
        snprintf(url, sizeof url, "http://%s/latest/meta-data", hosts[i]);
        struct outcome o = put_url(&closed, &quick, url);
        if (o.code != ERR_REFUSED)
            fail_msg("%s: %s", url, o.err.text);
        assert_false(o.err.retryable);
        assert_non_null(strstr(o.err.text, "loopback, private or reserved"));
    }
    // A name is judged by its address; nothing reaches the host.
    struct place p;
    place_sink(&p, NULL);
    char url[128];
    snprintf(url, sizeof url, "http://localhost:%u/x.png", p.port);
    assert_int_equal(put_url(&p.policy, &quick, url).code, ERR_REFUSED); // 127.0.0.1:PORT is allowed, not this name
    assert_int_equal(put_to_sink(&(struct place){.host = "127.0.0.1:1", .policy = p.policy}, &quick).code, ERR_REFUSED);
    assert_int_equal(puts_of(&p, "x.png"), 0);
    snprintf(p.host, sizeof p.host, "LocalHost:%u", p.port);
    assert_int_equal(put_url(&p.policy, &quick, url).code, 0);
    place_close(&p);
}

static void test_public_addresses(void **state)
{
    (void)state;
    static const char *const open[] = {
        "http://8.8.8.8/x",          "https://1.1.1.1:8443/", "http://172.15.0.1/",
        "http://172.32.0.1/",        "http://100.128.0.1/",   "https://[2606:4700::1111]/x",
        "https://example.com/a?b=c", "http://11.0.0.1",       "http://223.255.255.254/"};
    struct err e = {0};
    bool allowed = true;
    for (size_t i = 0; i < sizeof open / sizeof *open; i++) {
        assert_int_equal(target_check_url(&closed, open[i], &allowed, &e), 0);
        assert_false(allowed);
    }
}

static void test_bad_urls(void **state)
{
    (void)state;
    static const struct {
        const char *url;
        enum err_code code;
        const char *says;
    } cases[] = {
        {"ftp://8.8.8.8/x", ERR_REFUSED, "scheme ftp"},
        {"file:///etc/passwd", ERR_REFUSED, "scheme file"},
        {"gopher://8.8.8.8/", ERR_REFUSED, "scheme gopher"},
        {"http://user:hunter2pass@8.8.8.8/", ERR_REFUSED, "user and password"},
        {"//8.8.8.8/x", ERR_INVALID, "upload URL"},
        {"8.8.8.8/x", ERR_INVALID, "upload URL"},
        {"http://", ERR_INVALID, "upload URL"},
        {"http://8.8.8.8:0/", ERR_INVALID, "port 0"},
        {"http://8.8.8.8:70000/", ERR_INVALID, "upload URL"},
        {"http://8.8.8.8:x/", ERR_INVALID, "upload URL"},
        {"http://8.8.8.8/a b", ERR_INVALID, "percent-encode"},
        {"http://8.8.8.8/a\r\nHost: x", ERR_INVALID, "percent-encode"},
        {"http://8.8.8.8/\xc3\xa9", ERR_INVALID, "percent-encode"},
        {"http://8.8.8.8/{name}", ERR_INVALID, "{id}, {attempt} and {index}"},
        {"http://8.8.8.8/{id", ERR_INVALID, "{id}, {attempt} and {index}"},
        {"http://8.8.8.8/}", ERR_INVALID, "{id}, {attempt} and {index}"},
        {"", ERR_INVALID, "exactly one"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct outcome o = put_url(&closed, &quick, cases[i].url);
        if (o.code != (int)cases[i].code || !strstr(o.err.text, cases[i].says))
            fail_msg("%s: %s", cases[i].url, o.err.text);
        assert_null(strstr(o.err.text, "hunter2pass"));
        assert_int_equal(o.result.tries, 0);
    }
}

static void test_bad_headers(void **state)
{
    (void)state;
    static const char *const bad[][2] = {{"", "v"},           {"a b", "v"},           {"a:", "v"},
                                         {"a", "x\r\nb: c"},  {"Host", "v"},          {"EXPECT", "100"},
                                         {"proxy-auth", "v"}, {"Content-Length", "1"}};
    struct err e;
    struct uploader *u = uploader_new(&closed, &quick, NULL, &e);
    Ditfleet__V1__Header header = DITFLEET__V1__HEADER__INIT;
    Ditfleet__V1__Header *headers[] = {&header};
    Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
    output.url = (char *)"https://example.com/{id}";
    output.headers = headers;
    output.n_headers = 1;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        header.name = (char *)bad[i][0];
        header.value = (char *)bad[i][1];
        assert_int_equal(uploader_check(u, &output, "id", &e), ERR_INVALID);
        assert_non_null(strstr(e.text, "output header"));
    }
    header.name = (char *)"Content-Type";
    assert_int_equal(uploader_check(u, &output, "id", &e), 0);
    output.file = (char *)"/tmp/x"; // both
    assert_int_equal(uploader_check(u, &output, "id", &e), ERR_INVALID);
    assert_int_equal(uploader_check(u, NULL, "id", &e), ERR_INVALID);
    uploader_free(u);
}

static void test_bad_configuration(void **state)
{
    (void)state;
    static const char *const bad[] = {"127.0.0.1", "host:0", "host:99999", "http://host:80",
                                      "a@host:80", "",       "host:80/x"};
    struct err e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct upload_policy policy = {.allow_hosts = &bad[i], .n_allow_hosts = 1};
        assert_null(uploader_new(&policy, &quick, NULL, &e));
        assert_int_equal(e.code, ERR_INVALID);
        assert_non_null(strstr(e.text, "host:port"));
    }
    struct upload_options o = upload_defaults;
    o.attempts = 0;
    assert_null(uploader_new(&closed, &o, NULL, &e));
    assert_non_null(strstr(e.text, "attempts"));
    o = upload_defaults;
    o.total_timeout_seconds = __builtin_nan("");
    assert_null(uploader_new(&closed, &o, NULL, &e));
    assert_non_null(strstr(e.text, "total_timeout_seconds"));
}

// ---- secrets

static void test_secrets(void **state)
{
    (void)state;
    static const char *const answers[] = {
        "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n<Code>AccessDenied</Code>\n \"quoted\"",
        "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\nyou sent topsecrettoken",
        "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n<SignatureProvided>deadbeefcafe</SignatureProvided>",
        "HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\ntopsecrettoken, deadbeefcafe",
    };
    static const char *const expected[] = {"403: <Code>AccessDenied</Code> 'quoted'", "not quoted", "not quoted",
                                           "2 tries"};
    for (size_t i = 0; i < 4; i++) {
        struct canned c;
        canned_start(&c, answers[i]);
        const char *allow[] = {c.host};
        struct upload_policy policy = {.allow_hosts = allow, .n_allow_hosts = 1};
        char url[128];
        snprintf(url, sizeof url, "http://%s/dir/x.png?a=1&sig=deadbeefcafe", c.host);
        Ditfleet__V1__Header header = DITFLEET__V1__HEADER__INIT;
        header.name = (char *)"Authorization";
        header.value = (char *)"Bearer topsecrettoken";
        Ditfleet__V1__Header *headers[] = {&header};
        Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
        output.url = url;
        output.headers = headers;
        output.n_headers = 1;
        struct upload_options two = quick;
        two.attempts = 2;
        two.stall_seconds = 0.1;
        struct outcome o = put(&policy, &two, &output, NULL, NULL);
        canned_stop(&c);
        assert_int_equal(o.code, i < 3 ? ERR_UPLOAD : ERR_TIMEOUT); // the second try of the last finds nobody
        assert_non_null(strstr(o.err.text, expected[i]));
        assert_non_null(strstr(o.err.text, "/dir/x.png"));
        assert_null(strstr(o.err.text, "topsecret"));
        assert_null(strstr(o.err.text, "deadbeef"));
    }
    char shown[128];
    target_redact("https://u:p@h:1/path?q=secret#f", shown, sizeof shown);
    assert_string_equal(shown, "https://h:1/path");
    target_redact("::", shown, sizeof shown);
    assert_string_equal(shown, "(malformed URL)");
}

// ---- files

static struct outcome put_file(const struct place *p, const char *path)
{
    Ditfleet__V1__Output output = DITFLEET__V1__OUTPUT__INIT;
    output.file = (char *)path;
    return put(&p->policy, &quick, &output, NULL, NULL);
}

static void test_files(void **state)
{
    (void)state;
    struct place p;
    place_open(&p);
    char path[256], body[64];
    snprintf(path, sizeof path, "%s/a/b/{id}-{index}.png", p.roots[0]);
    for (int i = 0; i < 2; i++) { // the second replaces the first
        struct outcome o = put_file(&p, path);
        assert_int_equal(o.code, 0);
        assert_non_null(strstr(o.result.location, "/a/b/job%2F1%20a-2.png"));
        free(o.result.location);
    }
    read_text(p.roots[0], "a/b/job%2F1%20a-2.png", body, sizeof body);
    assert_string_equal(body, picture);
    snprintf(path, sizeof path, "%s/a/b", p.roots[0]); // a directory is there
    assert_int_equal(put_file(&p, path).code, ERR_REFUSED);
    place_close(&p);
}

static void test_file_escapes(void **state)
{
    (void)state;
    struct place p;
    place_open(&p);
    char path[256], link_name[256];
    static const char *const bad[] = {"/../x", "/a/../../x", "/a/..", "/", "", "//x", "/./x", "/a//x", "-beside/x"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(path, sizeof path, "%s%s", p.roots[0], bad[i]);
        struct outcome o = put_file(&p, path);
        if (o.code != ERR_REFUSED)
            fail_msg("%s: %d %s", path, o.code, o.err.text);
    }
    assert_int_equal(put_file(&p, "/etc/ditfleet-test").code, ERR_REFUSED);
    assert_int_equal(put_file(&p, "relative").code, ERR_REFUSED);
    // A link to a directory outside is not followed, a link at the end is replaced, not written through.
    snprintf(link_name, sizeof link_name, "%s/out", p.roots[0]);
    assert_int_equal(symlink(p.dir, link_name), 0);
    snprintf(path, sizeof path, "%s/out/x", p.roots[0]);
    assert_int_equal(put_file(&p, path).code, ERR_REFUSED);
    snprintf(path, sizeof path, "%s/x", p.dir);
    assert_int_not_equal(access(path, F_OK), 0);
    snprintf(link_name, sizeof link_name, "%s/y", p.roots[0]);
    assert_int_equal(symlink(path, link_name), 0);
    struct outcome o = put_file(&p, link_name);
    assert_int_equal(o.code, 0);
    free(o.result.location);
    assert_int_not_equal(access(path, F_OK), 0);
    place_close(&p);
}

int main(void)
{
    // The environment's proxy must not matter.
    setenv("http_proxy", "http://127.0.0.1:1", 1);
    setenv("ALL_PROXY", "http://127.0.0.1:1", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_template),
        cmocka_unit_test(test_success),
        cmocka_unit_test(test_request),
        cmocka_unit_test(test_retries),
        cmocka_unit_test(test_retry_after),
        cmocka_unit_test(test_final_statuses),
        cmocka_unit_test(test_refused_port),
        cmocka_unit_test(test_hang),
        cmocka_unit_test(test_stop),
        cmocka_unit_test(test_endless_answers),
        cmocka_unit_test(test_rebinding),
        cmocka_unit_test(test_default_policy),
        cmocka_unit_test(test_public_addresses),
        cmocka_unit_test(test_bad_urls),
        cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_bad_configuration),
        cmocka_unit_test(test_secrets),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_file_escapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
