// The supervisor-worker messages: what goes in comes out, and no bytes whatever are trusted.
#include "proto/msg.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

static const struct msg beat = {.kind = MSG_BEAT,
                                .stage = STAGE_DENOISE,
                                .step = 3,
                                .steps = 20,
                                .progress = UINT64_MAX,
                                .busy_seconds = 1.25,
                                .job = "default:job-1"};

static void a_beat_survives_the_trip(void **state)
{
    (void)state;
    uint8_t bytes[MSG_BYTES];
    struct msg m;
    struct err err = {0};
    msg_format(&beat, bytes);
    assert_int_equal(msg_parse(bytes, sizeof bytes, &m, &err), 0);
    assert_int_equal(m.kind, MSG_BEAT);
    assert_int_equal(m.stage, STAGE_DENOISE);
    assert_int_equal(m.step, 3);
    assert_int_equal(m.steps, 20);
    assert_true(m.progress == UINT64_MAX);
    assert_true(m.busy_seconds == 1.25);
    assert_string_equal(m.job, "default:job-1");
}

static void text_is_cut_and_made_printable(void **state)
{
    (void)state;
    uint8_t bytes[MSG_BYTES];
    struct msg bye = {.kind = MSG_BYE}, m;
    struct err err = {0};
    memset(bye.reason, 'r', sizeof bye.reason); // no NUL
    bye.reason[1] = '\n';
    msg_format(&bye, bytes);
    assert_int_equal(msg_parse(bytes, sizeof bytes, &m, &err), 0);
    assert_int_equal(strlen(m.reason), MSG_REASON_BYTES - 1);
    assert_int_equal(m.reason[1], '?');
    memset(bytes + 48, 'x', MSG_BYTES - 48); // text up to the end
    assert_int_equal(msg_parse(bytes, sizeof bytes, &m, &err), 0);
    assert_int_equal(strlen(m.reason), MSG_REASON_BYTES - 1);
}

static void another_version_is_refused_by_both_numbers(void **state)
{
    (void)state;
    uint8_t bytes[MSG_BYTES];
    struct msg m;
    struct err err = {0};
    msg_format(&beat, bytes);
    bytes[4] = 9;
    assert_int_equal(msg_parse(bytes, sizeof bytes, &m, &err), ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "version 9"));
    assert_non_null(strstr(err.text, "version 1"));
}

static void wrong_bytes_are_refused(void **state)
{
    (void)state;
    uint8_t bytes[MSG_BYTES];
    struct msg m, bad = beat;
    struct err err = {0};
    msg_format(&beat, bytes);
    for (size_t n = 0; n < MSG_BYTES; n++)
        assert_int_equal(msg_parse(bytes, n, &m, &err), ERR_CORRUPT);
    static const struct {
        int at, value;
    } damage[] = {{0, 0}, {6, 0}, {6, MSG_KINDS}, {7, 1}, {8, STAGES}, {11, 1}};
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        msg_format(&beat, bytes);
        bytes[damage[i].at] = (uint8_t)damage[i].value;
        assert_int_equal(msg_parse(bytes, sizeof bytes, &m, &err), ERR_CORRUPT);
    }
    static const double wrong[] = {NAN, INFINITY, -1};
    for (int i = 0; i < 3; i++) {
        bad.busy_seconds = wrong[i];
        msg_format(&bad, bytes);
        assert_int_equal(msg_parse(bytes, sizeof bytes, &m, &err), ERR_CORRUPT);
    }
}

// Random bytes behind a good header, from a fixed generator: a verdict each time, text ends inside its field.
static void random_bytes_never_crash(void **state)
{
    (void)state;
    uint8_t bytes[MSG_BYTES];
    uint64_t x = 88172645463325252u;
    int taken = 0;
    for (int round = 0; round < 20000; round++) {
        struct msg m;
        struct err err = {0};
        msg_format(&beat, bytes);
        for (int i = round % 12; i < MSG_BYTES; i++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            bytes[i] = (uint8_t)x;
        }
        if (msg_parse(bytes, sizeof bytes, &m, &err) == 0) {
            taken++;
            assert_true(strnlen(m.job, sizeof m.job) < sizeof m.job);
            assert_true(strnlen(m.reason, sizeof m.reason) < sizeof m.reason);
            assert_true((unsigned)m.stage < STAGES);
        }
    }
    assert_true(taken >= 0);
}

static void a_socket_carries_messages_and_tells_its_end(void **state)
{
    (void)state;
    int s[2];
    struct msg m;
    struct err err = {0};
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, s), 0);
    assert_int_equal(msg_receive(s[0], &m, &err), ERR_TIMEOUT);
    assert_int_equal(msg_send(s[1], &beat, &err), 0);
    assert_int_equal(msg_receive(s[0], &m, &err), 0);
    assert_int_equal(m.step, 3);
    uint8_t over[MSG_BYTES + 40] = {0};
    assert_int_equal(send(s[1], over, sizeof over, 0), sizeof over);
    assert_int_equal(msg_receive(s[0], &m, &err), ERR_CORRUPT);
    int rc = 0;
    while (rc == 0)
        rc = msg_send(s[1], &beat, &err);
    assert_int_equal(rc, ERR_TIMEOUT); // full, not gone
    close(s[0]);
    assert_int_equal(msg_send(s[1], &beat, &err), ERR_UNAVAILABLE);
    assert_int_equal(msg_receive(s[1], &m, &err), ERR_UNAVAILABLE);
    close(s[1]);
}

static void every_stage_has_its_name(void **state)
{
    (void)state;
    assert_string_equal(stage_name(STAGE_STARTING), "starting");
    assert_string_equal(stage_name(STAGE_EXITING), "exiting");
    assert_string_equal(stage_name(STAGES), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_beat_survives_the_trip),
        cmocka_unit_test(text_is_cut_and_made_printable),
        cmocka_unit_test(another_version_is_refused_by_both_numbers),
        cmocka_unit_test(wrong_bytes_are_refused),
        cmocka_unit_test(random_bytes_never_crash),
        cmocka_unit_test(a_socket_carries_messages_and_tells_its_end),
        cmocka_unit_test(every_stage_has_its_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
