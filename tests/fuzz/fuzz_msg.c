// fuzz_msg.c: a message between supervisor and worker. What is taken, and written again, says the same.
#include "tests/fuzz/fuzz.h"

#include <math.h>

#include "proto/msg.h"

static bool printable(const char *text, size_t room)
{
    size_t n = strnlen(text, room);
    for (size_t i = 0; i < n; i++)
        if (text[i] < 0x20 || text[i] > 0x7e)
            return false;
    return n < room;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct msg first, second;
    struct err err = {0};
    uint8_t once[MSG_BYTES], twice[MSG_BYTES];
    if (!fuzz_good(msg_parse(data, size, &first, &err), &err))
        return 0;
    PROMISE(first.kind > 0 && first.kind < MSG_KINDS && (unsigned)first.stage < STAGES);
    PROMISE(isfinite(first.busy_seconds) && first.busy_seconds >= 0);
    PROMISE(printable(first.job, sizeof first.job) && printable(first.reason, sizeof first.reason));
    msg_format(&first, once);
    PROMISE(msg_parse(once, sizeof once, &second, &err) == 0);
    msg_format(&second, twice);
    PROMISE(memcmp(once, twice, sizeof once) == 0);
    return 0;
}
