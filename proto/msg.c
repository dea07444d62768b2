// Fixed-size messages in little-endian byte order. Layout: magic 4, version 2, kind 2, stage 4, pid 4, step 4, steps 4,
// progress 8, busy 8 (IEEE double), reserved 8, then text: the job of a BEAT, the reason of a BYE; zeros to the end.
#include "proto/msg.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/socket.h>

#define MAGIC 0x464c5444u // "DTLF"
enum {
    AT_MAGIC = 0,
    AT_VERSION = 4,
    AT_KIND = 6,
    AT_STAGE = 8,
    AT_PID = 12,
    AT_STEP = 16,
    AT_STEPS = 20,
    AT_PROGRESS = 24,
    AT_BUSY = 32,
    AT_TEXT = 48
};
static_assert(AT_TEXT + MSG_JOB_BYTES <= MSG_BYTES && AT_TEXT + MSG_REASON_BYTES <= MSG_BYTES, "the text fits");

static const char *const stage_names[] = {
    [STAGE_STARTING] = "starting", [STAGE_LOADING] = "loading", [STAGE_IDLE] = "idle", [STAGE_TEXT] = "text",
    [STAGE_DENOISE] = "denoise",   [STAGE_DECODE] = "decode",   [STAGE_PNG] = "png",   [STAGE_UPLOAD] = "upload",
    [STAGE_DRAINING] = "draining", [STAGE_EXITING] = "exiting",
};
static_assert(sizeof stage_names / sizeof *stage_names == STAGES, "every stage has a name");

const char *stage_name(enum stage stage)
{
    return (unsigned)stage < STAGES ? stage_names[stage] : "unknown";
}

static void put(uint8_t *to, uint64_t v, int bytes)
{
    for (int i = 0; i < bytes; i++)
        to[i] = (uint8_t)(v >> 8 * i);
}

static uint64_t get(const uint8_t *from, int bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++)
        v |= (uint64_t)from[i] << 8 * i;
    return v;
}

void msg_format(const struct msg *m, uint8_t bytes[MSG_BYTES])
{
    uint64_t busy;
    memcpy(&busy, &m->busy_seconds, sizeof busy);
    memset(bytes, 0, MSG_BYTES);
    put(bytes + AT_MAGIC, MAGIC, 4);
    put(bytes + AT_VERSION, MSG_VERSION, 2);
    put(bytes + AT_KIND, (uint64_t)m->kind, 2);
    put(bytes + AT_STAGE, (uint64_t)m->stage, 4);
    put(bytes + AT_PID, (uint32_t)m->pid, 4);
    put(bytes + AT_STEP, m->step, 4);
    put(bytes + AT_STEPS, m->steps, 4);
    put(bytes + AT_PROGRESS, m->progress, 8);
    put(bytes + AT_BUSY, busy, 8);
    if (m->kind == MSG_BEAT)
        memcpy(bytes + AT_TEXT, m->job, strnlen(m->job, MSG_JOB_BYTES - 1));
    if (m->kind == MSG_BYE)
        memcpy(bytes + AT_TEXT, m->reason, strnlen(m->reason, MSG_REASON_BYTES - 1));
}

// Control characters would break log lines and terminals, other bytes the JSON of status.
static void copy_text(char *to, const uint8_t *from, size_t room)
{
    size_t n = strnlen((const char *)from, room - 1);
    for (size_t i = 0; i < n; i++)
        to[i] = from[i] < 0x20 || from[i] > 0x7e ? '?' : (char)from[i];
    to[n] = 0;
}

int msg_parse(const uint8_t *bytes, size_t n, struct msg *m, struct err *err)
{
    if (n != MSG_BYTES)
        return err_set(err, ERR_CORRUPT, "message of %zu bytes, expected %d", n, MSG_BYTES);
    if (get(bytes + AT_MAGIC, 4) != MAGIC)
        return err_set(err, ERR_CORRUPT, "message does not begin with the magic number");
    unsigned version = (unsigned)get(bytes + AT_VERSION, 2), kind = (unsigned)get(bytes + AT_KIND, 2);
    if (version != MSG_VERSION)
        return err_set(err, ERR_UNSUPPORTED,
                       "the peer speaks message version %u, this program version %d; install supervisor and worker "
                       "of one release",
                       version, MSG_VERSION);
    if (kind == 0 || kind >= MSG_KINDS)
        return err_set(err, ERR_CORRUPT, "message kind %u, known are 1 to %d", kind, MSG_KINDS - 1);
    *m = (struct msg){.kind = (enum msg_kind)kind, .pid = (int32_t)get(bytes + AT_PID, 4)};
    if (m->kind == MSG_BYE)
        copy_text(m->reason, bytes + AT_TEXT, sizeof m->reason);
    if (m->kind != MSG_BEAT)
        return 0;
    uint64_t stage = get(bytes + AT_STAGE, 4), busy = get(bytes + AT_BUSY, 8);
    if (stage >= STAGES)
        return err_set(err, ERR_CORRUPT, "message stage %llu, known are 0 to %d", (unsigned long long)stage,
                       STAGES - 1);
    m->stage = (enum stage)stage;
    m->step = (uint32_t)get(bytes + AT_STEP, 4);
    m->steps = (uint32_t)get(bytes + AT_STEPS, 4);
    m->progress = get(bytes + AT_PROGRESS, 8);
    memcpy(&m->busy_seconds, &busy, sizeof busy);
    if (!isfinite(m->busy_seconds) || m->busy_seconds < 0)
        return err_set(err, ERR_CORRUPT, "message with busy seconds that are no finite number from 0");
    copy_text(m->job, bytes + AT_TEXT, sizeof m->job);
    return 0;
}

int msg_send(int fd, const struct msg *m, struct err *err)
{
    uint8_t bytes[MSG_BYTES];
    ssize_t n;
    msg_format(m, bytes);
    do
        n = send(fd, bytes, sizeof bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n == (ssize_t)sizeof bytes)
        return 0;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return err_set(err, ERR_TIMEOUT, "the peer does not read its messages");
    return err_set(err, ERR_UNAVAILABLE, "the peer's end of the control socket is gone: %s", strerror(errno));
}

int msg_receive(int fd, struct msg *m, struct err *err)
{
    uint8_t bytes[MSG_BYTES + 1]; // one more: an over-long datagram must not look whole
    ssize_t n;
    do
        n = recv(fd, bytes, sizeof bytes, 0);
    while (n < 0 && errno == EINTR);
    if (n > 0)
        return msg_parse(bytes, (size_t)n, m, err);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return err_set(err, ERR_TIMEOUT, "no message there");
    return err_set(err, ERR_UNAVAILABLE, "the peer's end of the control socket is gone%s%s", n < 0 ? ": " : "",
                   n < 0 ? strerror(errno) : "");
}
