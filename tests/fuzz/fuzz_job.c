// fuzz_job.c: a Job from a stranger, through parsing and validation; and results and events. What is taken, packed and
// parsed again is the same job.
#include "tests/fuzz/fuzz.h"

#include "proto/job.h"

// The bytes of a job as this program writes it.
static void *pack(const Ditfleet__V1__Job *job, size_t *length)
{
    void *bytes;
    struct err err = {0};
    PROMISE(job_pack(job, &bytes, length, &err) == 0);
    return bytes;
}

static void go_round(Ditfleet__V1__Job *job)
{
    Ditfleet__V1__Job *again, *copy = job_copy(job);
    struct err err = {0};
    char id[JOB_NAME_SIZE];
    size_t length, length_again, length_copy;
    PROMISE(copy && job_validate(copy, &err) == 0);
    void *bytes = pack(job, &length), *bytes_copy = pack(copy, &length_copy);
    PROMISE(length == length_copy && memcmp(bytes, bytes_copy, length) == 0);
    PROMISE(job_parse(bytes, length, &again, id, &err) == 0 && strcmp(id, job->id) == 0);
    void *bytes_again = pack(again, &length_again);
    PROMISE(length == length_again && memcmp(bytes, bytes_again, length) == 0);
    free(bytes);
    free(bytes_copy);
    free(bytes_again);
    job_free(copy);
    job_free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Ditfleet__V1__Job *job;
    Ditfleet__V1__Result *result;
    Ditfleet__V1__Event *event;
    struct err err = {0};
    char id[JOB_NAME_SIZE];
    if (fuzz_good(job_parse(data, size, &job, id, &err), &err))
        go_round(job);
    job_free(job);
    if (fuzz_good(result_unpack(data, size, &result, &err), &err))
        result_free(result);
    if (fuzz_good(event_unpack(data, size, &event, &err), &err))
        event_free(event);
    return 0;
}
