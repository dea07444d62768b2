"""No-op jobs for RQ, Celery and BullMQ; each counts itself in Redis, so that the end is seen alike. REDIS_SOCKET is the
server's."""
import asyncio
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


async def bullmq_enqueue(jobs):
    from bullmq import Queue
    queue = Queue("tasks", {"connection": f"unix://{SOCKET}"})
    for _ in range(jobs):
        await queue.add("count", {}, {"removeOnComplete": True})
    await queue.close()


async def bullmq_work():
    from bullmq import Worker
    client = redis.asyncio.Redis(unix_socket_path=SOCKET)

    async def process(job, token):
        await client.incr("bench:done")

    await Worker("tasks", process, {"connection": f"unix://{SOCKET}", "concurrency": 10, "autorun": False}).run()


def enqueue(peer, jobs):
    if peer == "rq":
        from rq import Queue
        queue = Queue(connection=connection)
        for _ in range(jobs):
            queue.enqueue(count, result_ttl=0)
    elif peer == "bullmq":
        asyncio.run(bullmq_enqueue(jobs))
    else:
        for _ in range(jobs):
            celery_count.delay()
