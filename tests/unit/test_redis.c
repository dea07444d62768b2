// test_redis.c: the connection: URLs, deadlines, reconnection, refusals, TLS.
#include "private_redis.h"
#include "proto/redis.h"
#include "scripted_redis.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>

static struct redis *connect_to(const char *url, const struct redis_options *options)
{
    struct redis *r;
    struct err e = {0};
    if (redis_open(&r, url, options, &e) != 0)
        fail_msg("%s", e.text);
    return r;
}

static void test_urls(void **state)
{
    (void)state;
    static const char *const good[][2] = {
        {"redis://h", "redis://h:6379"},
        {"redis://u:p@h:1/3", "redis://h:1"},
        {"rediss://:p%40w@h.example:7/", "rediss://h.example:7"},
        {"redis://[::1]:7", "redis://::1:7"},
        {"unix:///run/a%20b", "unix:/run/a b"},
        {"unix:///run/a?db=2", "unix:/run/a"},
        {"redis://u:p@p@h", "redis://h:6379"},
        {"sentinel://a/m", "sentinel://a/m"},
        {"sentinel://u:secret@a:1,[::1]:2,c/m%2Fm/3", "sentinel://a:1,[::1]:2,c/m/m"},
    };
    static const char *const bad[] = {
        "http://h",
        "redis://",
        "redis://h:0",
        "redis://h:x",
        "redis://h/x",
        "redis://u:secret%zz@h",
        "redis://[::1",
        "unix://relative",
        "unix:///a?x=1",
        "redis://h:70000",
        "redis://u:secret%00@h",
        "",
        "redis://h?x=1",
        "sentinel://a",
        "sentinel://a/",
        "sentinel:///m",
        "sentinel://a,/m",
        "sentinel://a,,b/m",
        "sentinel://a:0/m",
        "sentinel://a/m/x",
        "sentinel://a/m?x=1",
        "sentinel://u:secret%zz@a/m",
        "sentinel://1,2,3,4,5,6,7,8,9/m",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct redis *r = connect_to(good[i][0], NULL);
        assert_string_equal(redis_address(r), good[i][1]);
        redis_close(r);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct redis *r;
        struct err e = {0};
        if (redis_open(&r, bad[i], NULL, &e) != ERR_INVALID || strstr(e.text, "secret"))
            fail_msg("%s: %s", bad[i], e.text);
    }
}

static void test_refusals(void **state)
{
    struct private_redis *server = *state;
    struct redis *r = connect_to(server->url, NULL);
    struct err e = {0};
    redisReply *reply;
    assert_int_equal(redis_command(r, &reply, &e, "SET k %s", "v"), 0);
    freeReplyObject(reply);
    assert_int_equal(redis_command(r, &reply, &e, "LPUSH k x"), ERR_CORRUPT); // WRONGTYPE
    assert_null(reply);
    assert_int_equal(redis_command(r, NULL, &e, "XREADGROUP GROUP g c STREAMS s >"), ERR_NOT_FOUND);
    assert_int_equal(redis_problem(r), REDIS_PROBLEM_NOGROUP);
    assert_int_equal(redis_command(r, NULL, &e, "NOSUCH my-secret-argument"), ERR_INTERNAL);
    assert_null(strstr(e.text, "secret"));
    assert_int_equal(redis_command(r, NULL, &e, "PING"), 0); // refusals leave the connection in order
    assert_int_equal(redis_problem(r), REDIS_PROBLEM_NONE);
    redis_close(r);
}

static void test_login(void **state)
{
    struct private_redis *server = *state;
    struct redis *admin = connect_to(server->url, NULL), *r;
    struct err e = {0};
    char url[200];
    redisReply *reply;
    assert_int_equal(redis_command(admin, NULL, &e, "ACL SETUSER bob on >p@ss ~* +@all"), 0);
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET requirepass top"), 0);
    // Over TCP, since a Unix socket's URL carries no user.
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &size), 0);
    close(fd);
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET port %d", ntohs(a.sin_port)), 0);
    static const char *const logins[] = {"bob:p%40ss@", ":top@", "bob:wrong-secret@", ""};
    for (int i = 0; i < 4; i++) {
        snprintf(url, sizeof url, "redis://%s127.0.0.1:%d/%d", logins[i], ntohs(a.sin_port), i);
        r = connect_to(url, NULL);
        int rc = redis_command(r, &reply, &e, "CLIENT LIST ID 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16");
        assert_int_equal(rc, i < 2 ? 0 : ERR_REFUSED);
        assert_null(strstr(e.text, "wrong-secret"));
        if (rc == 0) {
            assert_non_null(strstr(reply->str, i == 0 ? "db=0" : "db=1"));
            freeReplyObject(reply);
        }
        redis_close(r);
    }
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET port 0"), 0);
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET requirepass %s", ""), 0);
    redis_close(admin);
}

static void test_deadline_and_reconnection(void **state)
{
    struct private_redis *server = *state;
    struct redis_options quick = {.command_ms = 1000}; // a loaded machine answers PING within it
    struct redis *r = connect_to(server->url, &quick), *other = connect_to(server->url, NULL);
    struct err e = {0};
    redisReply *reply;
    assert_int_equal(redis_command(r, NULL, &e, "BLPOP nothing 0"), ERR_TIMEOUT);
    assert_true(e.retryable);
    // The late reply cannot be taken for the next command's: the connection is another.
    assert_int_equal(redis_command(r, &reply, &e, "ECHO hello"), 0);
    assert_string_equal(reply->str, "hello");
    freeReplyObject(reply);
    assert_int_equal(redis_command(other, NULL, &e, "CLIENT KILL TYPE normal"), 0);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_UNAVAILABLE); // may have been executed: not repeated
    assert_int_equal(redis_command(r, NULL, &e, "PING"), 0);
    const char *block[] = {"BLPOP", "nothing", "0.2"};
    assert_int_equal(redis_command_blocking(r, NULL, &e, 200, 3, block, NULL), 0);
    redis_close(r);
    redis_close(other);
}

static void test_pipeline_and_scripts(void **state)
{
    struct private_redis *server = *state;
    struct redis *r = connect_to(server->url, NULL);
    struct err e = {0};
    redisReply *reply;
    // More than the socket's buffers hold in either direction.
    char *big = malloc(1 << 20);
    memset(big, 'x', 1 << 20);
    const char *echo[] = {"ECHO", big};
    const size_t lengths[] = {4, 1 << 20};
    for (int i = 0; i < 16; i++)
        assert_int_equal(redis_append_argv(r, &e, 2, echo, lengths), 0);
    for (int i = 0; i < 16; i++) {
        assert_int_equal(redis_get_reply(r, &reply, &e), 0);
        assert_int_equal(reply->len, 1 << 20);
        freeReplyObject(reply);
    }
    free(big);
    struct redis_script script;
    static const char text[] = "return {KEYS[1], ARGV[1], #ARGV}";
    const char *argv[] = {"a", "b"};
    redis_script(&script, text, sizeof text - 1);
    for (int i = 0; i < 3; i++) {
        if (i == 2)
            assert_int_equal(redis_command(r, NULL, &e, "SCRIPT FLUSH"), 0);
        assert_int_equal(redis_eval(r, &script, &reply, &e, "key", 2, argv, NULL), 0);
        assert_string_equal(reply->element[0]->str, "key");
        assert_int_equal(reply->element[2]->integer, 2);
        freeReplyObject(reply);
    }
    redis_close(r);
}

// A self-signed certificate for 127.0.0.1 and its key.
static void write_certificate(const char *certificate, const char *key)
{
    EVP_PKEY *pair = EVP_EC_gen("P-256");
    X509 *x = X509_new();
    X509_set_version(x, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
    X509_gmtime_adj(X509_getm_notBefore(x), -3600);
    X509_gmtime_adj(X509_getm_notAfter(x), 3600);
    X509_set_pubkey(x, pair);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(x), "CN", MBSTRING_ASC, (const unsigned char *)"test", -1, -1, 0);
    X509_set_issuer_name(x, X509_get_subject_name(x));
    X509_EXTENSION *names = X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name, "IP:127.0.0.1");
    X509_add_ext(x, names, -1);
    X509_EXTENSION_free(names);
    assert_true(X509_sign(x, pair, EVP_sha256()) > 0);
    FILE *f = fopen(certificate, "w");
    PEM_write_X509(f, x);
    fclose(f);
    f = fopen(key, "w");
    PEM_write_PrivateKey(f, pair, NULL, NULL, 0, NULL, NULL);
    fclose(f);
    X509_free(x);
    EVP_PKEY_free(pair);
}

static void test_tls(void **state)
{
    struct private_redis *server = *state;
    struct redis *admin = connect_to(server->url, NULL), *r;
    struct err e = {0};
    char certificate[128], key[128], url[64];
    redisReply *reply;
    snprintf(certificate, sizeof certificate, "%s/cert.pem", server->folder);
    snprintf(key, sizeof key, "%s/key.pem", server->folder);
    write_certificate(certificate, key);
    int port = 20000 + getpid() % 20000;
    if (redis_command(admin, NULL, &e, "CONFIG SET tls-cert-file %s tls-key-file %s tls-auth-clients no tls-port %d",
                      certificate, key, port) != 0) {
        redis_close(admin);
        print_message("this Redis has no TLS: %s\n", e.text);
        skip();
    }
    snprintf(url, sizeof url, "rediss://127.0.0.1:%d", port);
    struct redis_options options = {.ca_file = certificate};
    r = connect_to(url, &options);
    if (redis_command(r, &reply, &e, "ECHO hello") != 0)
        fail_msg("%s", e.text);
    assert_string_equal(reply->str, "hello");
    freeReplyObject(reply);
    size_t size = 3 << 20;
    char *big = calloc(1, size);
    const char *echo[] = {"ECHO", big};
    const size_t lengths[] = {4, size};
    assert_int_equal(redis_command_argv(r, &reply, &e, 2, echo, lengths), 0);
    assert_int_equal(reply->len, size);
    freeReplyObject(reply);
    free(big);
    assert_int_equal(redis_command(admin, NULL, &e, "CLIENT KILL TYPE normal"), 0);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_UNAVAILABLE);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), 0);
    redis_close(r);
    // A certificate nobody vouches for, and one for another name.
    r = connect_to(url, NULL);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_UNAVAILABLE);
    assert_non_null(strstr(e.text, "certificate verify failed"));
    redis_close(r);
    snprintf(url, sizeof url, "rediss://localhost:%d", port);
    r = connect_to(url, &options);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_UNAVAILABLE);
    redis_close(r);
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET tls-port 0"), 0);
    redis_close(admin);
}

// A peer that accepts and says nothing, one that speaks something else, and one that announces more than it has.
static void test_odd_peers(void **state)
{
    (void)state;
    struct redis_options quick = {.command_ms = 50, .connect_ms = 50};
    struct err e = {0};
    char url[64];
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(fd, 8), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &size), 0);
    snprintf(url, sizeof url, "redis://127.0.0.1:%d", ntohs(a.sin_port));
    struct redis *r = connect_to(url, &quick);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_TIMEOUT);
    redis_close(r);
    snprintf(url, sizeof url, "rediss://127.0.0.1:%d", ntohs(a.sin_port));
    r = connect_to(url, &quick);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_TIMEOUT);
    redis_close(r);
    static const char *const answers[] = {"", "", "HTTP/1.1 400 Bad Request\r\n\r\n", "*674254002\r\n$1\r\na\r\n"};
    enum { ANSWERS = sizeof answers / sizeof *answers };
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < ANSWERS; i++) {
            int peer = accept(fd, NULL, NULL);
            usleep(10000);
            if (write(peer, answers[i], strlen(answers[i])) < 0 && *answers[i])
                _exit(1);
            usleep(20000);
            close(peer);
        }
        _exit(0);
    }
    snprintf(url, sizeof url, "redis://127.0.0.1:%d", ntohs(a.sin_port));
    struct redis_options patient = {.command_ms = 2000, .connect_ms = 2000};
    r = connect_to(url, &patient);
    for (int i = 2; i < ANSWERS; i++) {
        assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_UNAVAILABLE);
        assert_non_null(strstr(e.text, "does not speak the Redis protocol"));
    }
    redis_close(r);
    waitpid(child, NULL, 0);
    close(fd);
}

// What a server says that cannot do it now, or will not: each is told apart, and none but READONLY costs the
// connection.
static void test_refusals_of_a_server_in_trouble(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        enum err_code code;
        enum redis_problem problem;
    } rows[] = {
        {"-LOADING Redis is loading the dataset in memory\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
        {"-BUSY Redis is busy running a script.\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
        {"-MASTERDOWN Link with MASTER is down\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
        {"-CLUSTERDOWN The cluster is down\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
        {"-TRYAGAIN Multiple keys request during rehashing of slot\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
        {"-READONLY You can't write against a read only replica.\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_BUSY},
        {"-NOREPLICAS Not enough good replicas to write.\r\n", ERR_UNAVAILABLE, REDIS_PROBLEM_OTHER},
        {"-OOM command not allowed when used memory > 'maxmemory'.\r\n", ERR_NO_MEMORY, REDIS_PROBLEM_OTHER},
        {"-MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.\r\n",
         ERR_IO, REDIS_PROBLEM_OTHER},
        {"-NOSCRIPT No matching script.\r\n", ERR_NOT_FOUND, REDIS_PROBLEM_NOSCRIPT},
        {"-NOGROUP No such key 'x' or consumer group 'y'\r\n", ERR_NOT_FOUND, REDIS_PROBLEM_NOGROUP},
        {"-UNBLOCKED the stream key no longer exists\r\n", ERR_NOT_FOUND, REDIS_PROBLEM_NOGROUP},
        {"-NOPERM this user has no permissions to run the 'get' command\r\n", ERR_REFUSED, REDIS_PROBLEM_NOPERM},
        {"-ERR The user executing the script can't run this command or subcommand\r\n", ERR_REFUSED,
         REDIS_PROBLEM_NOPERM},
        {"-NOAUTH Authentication required.\r\n", ERR_REFUSED, REDIS_PROBLEM_OTHER},
        {"-NEWWORD of a later version\r\n", ERR_INTERNAL, REDIS_PROBLEM_OTHER},
    };
    enum { ROWS = sizeof rows / sizeof *rows };
    const char *lines[ROWS + 1];
    char url[64];
    for (size_t i = 0; i < ROWS; i++)
        lines[i] = rows[i].line;
    lines[ROWS] = "+PONG\r\n";
    pid_t child = serve_lines(lines, ROWS + 1, url);
    struct redis *r = connect_to(url, NULL);
    struct err e = {0};
    for (size_t i = 0; i < ROWS; i++) {
        assert_int_equal(redis_command(r, NULL, &e, "GET x"), rows[i].code);
        assert_int_equal(redis_problem(r), rows[i].problem);
        assert_int_equal(e.retryable, err_code_retryable(rows[i].code));
    }
    assert_int_equal(redis_command(r, NULL, &e, "PING"), 0);
    redis_close(r);
    waitpid(child, NULL, 0);
}

// Sentinels that are silent, ignorant or behind the times are passed over; a server that is no master is not taken.
static void test_sentinels(void **state)
{
    struct private_redis *server = *state;
    struct redis *admin = connect_to(server->url, NULL), *r;
    struct err e = {0};
    char sentinel[3][64], url[400], answer[100];
    redisReply *reply;
    const int port = 20000 + (getpid() + 7) % 20000;
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET port %d", port), 0);
    snprintf(answer, sizeof answer, "*2\r\n$9\r\n127.0.0.1\r\n$5\r\n%d\r\n", port);
    pid_t gone = serve_lines(NULL, 0, sentinel[0]);
    waitpid(gone, NULL, 0); // nobody listens there any more
    pid_t ignorant = serve_lines((const char *[]){"*-1\r\n", "*-1\r\n", "*-1\r\n"}, 3, sentinel[1]);
    pid_t knowing = serve_lines((const char *[]){answer, answer, answer}, 3, sentinel[2]);
    snprintf(url, sizeof url, "sentinel://%s,%s,%s/m/1", sentinel[0] + 8, sentinel[1] + 8, sentinel[2] + 8);
    r = connect_to(url, NULL);
    if (redis_command(r, &reply, &e, "CLIENT LIST") != 0)
        fail_msg("%s", e.text);
    assert_non_null(strstr(reply->str, "db=1"));
    freeReplyObject(reply);
    snprintf(url, sizeof url, "redis://127.0.0.1:%d (m)", port);
    assert_string_equal(redis_address(r), url);
    // A replica is none, whatever the sentinel says; it is looked up again for each try.
    assert_int_equal(redis_command(admin, NULL, &e, "REPLICAOF 127.0.0.1 1"), 0);
    assert_int_equal(redis_command(r, NULL, &e, "SET k v"), ERR_UNAVAILABLE);
    assert_int_equal(redis_problem(r), REDIS_PROBLEM_BUSY); // READONLY
    assert_int_equal(redis_command(r, NULL, &e, "SET k v"), ERR_UNAVAILABLE);
    assert_non_null(strstr(e.text, "is no master, or not yet"));
    assert_int_equal(redis_command(admin, NULL, &e, "REPLICAOF NO ONE"), 0);
    if (redis_command(r, NULL, &e, "SET k v") != 0)
        fail_msg("%s", e.text);
    redis_disconnect(r);
    assert_int_equal(redis_command(r, NULL, &e, "PING"), ERR_UNAVAILABLE); // nobody knows any more
    redis_close(r);
    kill(ignorant, SIGKILL);
    waitpid(ignorant, NULL, 0);
    waitpid(knowing, NULL, 0);
    assert_int_equal(redis_command(admin, NULL, &e, "CONFIG SET port 0"), 0);
    redis_close(admin);
}

static int start(void **state)
{
    struct private_redis *server = calloc(1, sizeof *server);
    *state = server;
    return private_redis_start(server, NULL);
}

static int stop(void **state)
{
    private_redis_stop(*state);
    free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_urls),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_login),
        cmocka_unit_test(test_deadline_and_reconnection),
        cmocka_unit_test(test_pipeline_and_scripts),
        cmocka_unit_test(test_tls),
        cmocka_unit_test(test_odd_peers),
        cmocka_unit_test(test_refusals_of_a_server_in_trouble),
        cmocka_unit_test(test_sentinels),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
