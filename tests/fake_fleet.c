// fake_fleet.c: a whole fleet with no model, for tests of clients: admits, claims, makes three steps and commits.
//
//   fake_fleet REDIS_URL
//
// A prompt of "fail" ends in DEAD with the code upload. Runs until it is killed; publishes the model shapes@1.
#include "proto/queue.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

static int run_job(struct queue *q, const struct queue_job *claimed, struct err *e)
{
    Ditfleet__V1__Job *job;
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    Ditfleet__V1__Image image = DITFLEET__V1__IMAGE__INIT, *images[] = {&image};
    struct err why;
    void *bytes;
    size_t length;
    TRY(job_parse(claimed->payload, claimed->payload_length, &job, NULL, e));
    for (unsigned step = 1; step <= 3; step++) {
        struct queue_progress p = {DITFLEET__V1__STATE__STATE_RUNNING, "denoise", step, 3, 0.1 * (3 - step)};
        TRY(queue_progress(q, &claimed->fence, &p, e));
    }
    err_set(&why, ERR_UPLOAD, "the host answered 403");
    if (strcmp(job->prompt, "fail") == 0) {
        job_free(job);
        return queue_fail(q, &claimed->fence, QUEUE_CAUSE_APP, &why, NULL, e);
    }
    image.location = job->output->url;
    result.id = job->id;
    result.state = DITFLEET__V1__STATE__STATE_SUCCEEDED;
    result.n_images = 1;
    result.images = images;
    result.used = job;
    result.attempt = (uint32_t)claimed->fence.epoch;
    int rc = result_pack(&result, &bytes, &length, e);
    job_free(job);
    TRY(rc);
    rc = queue_finish(q, &claimed->fence, bytes, length, e);
    free(bytes);
    return rc;
}

static int serve(struct queue *q, struct err *e)
{
    static const char *const pools[] = {"shapes@1"};
    const struct queue_admission admission = {.consumer = "fake"};
    const struct queue_claim want = {"fake", "1", pools, 1, 10000, 1};
    struct queue_admitted admitted;
    struct queue_job job;
    size_t n;
    TRY(queue_model_publish(q, "shapes", "1", e));
    for (;;) {
        TRY(queue_admit(q, &admission, 50, &admitted, e));
        TRY(queue_claim(q, &want, &job, &n, NULL, e));
        int rc = n ? run_job(q, &job, e) : 0;
        if (n)
            queue_job_free(&job);
        if (rc != 0 && rc != ERR_CANCELLED && rc != ERR_STALE)
            return rc;
    }
}

int main(int argc, char **argv)
{
    struct queue *q;
    struct err e = {0};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 2 || queue_open(&q, argv[1], "default", QUEUE_NODE, NULL, &e) != 0) {
        fprintf(stderr, "fake_fleet REDIS_URL: %s\n", e.text);
        return 2;
    }
    serve(q, &e);
    fprintf(stderr, "fake_fleet: %s\n", e.text);
    queue_close(q);
    return 1;
}
