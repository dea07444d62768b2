#include "worker/held.h"

#include <stdlib.h>

void held_free(struct held *h)
{
    if (!h)
        return;
    queue_job_free(&h->claim);
    job_free(h->job);
    engine_result_free(&h->result);
    free(h);
}

int held_check(const struct held *h, struct err *err)
{
    switch (atomic_load(&h->stop)) {
    case 0:
        return 0;
    case ERR_CANCELLED:
        return err_set(err, ERR_CANCELLED, "the job was cancelled");
    case ERR_EXPIRED:
        return err_set(err, ERR_EXPIRED, "the job's deadline passed");
    default:
        return err_set(err, ERR_STALE, "the lease was lost: the job is somebody else's by now");
    }
}
