"""No-op jobs for RQ and Celery; each counts itself in Redis, so that the end is seen alike. REDIS_SOCKET is the server's."""
import os

import redis

SOCKET = os.environ["REDIS_SOCKET"]
connection = redis.Redis(unix_socket_path=SOCKET)


def count():
    connection.incr("bench:done")


try:
    from celery import Celery
    app = Celery("tasks", broker=f"redis+socket://{SOCKET}")
    # Late acknowledgement: a worker's death gives its job back, as the fleet's queue and RQ do.
    app.conf.update(task_ignore_result=True, task_acks_late=True, worker_prefetch_multiplier=1)
    celery_count = app.task(name="count")(count)
except ImportError:
    pass


def enqueue(peer, jobs):
    if peer == "rq":
        from rq import Queue
        queue = Queue(connection=connection)
        for _ in range(jobs):
            queue.enqueue(count, result_ttl=0)
    else:
        for _ in range(jobs):
            celery_count.delay()

