/* job.pml: a job's life as proto/queue.lua writes it, for spin to search through: every order of every step of a
   client, admitters, workers, the supervisor, the reaper and a Redis that fails over, with EVENTS things going wrong in
   any combination. tests/e2e/model.sh runs it; replay.py repeats walks of it on Redis, through queue.lua itself.

   What is checked, and where:
   - the commit happens once, and a stale holder writes nothing, also after a failover: HOLDER, op_finish()
   - a final state stays; a record is in the index of its state and in no other: move()
   - one id is one job: op_admit()
   - each charged attempt has a fault of its kind behind it, the job's own budget only the job's errors: fail_attempt()
   - only the dead lose their jobs to release_all: op_release_all()
   - poison needs two crashes at two workers (-DCRASHES), not two deaths: blame()
   - cancel and finish: the first wins, and the answer says who did: client(), say_last_word()
   - no job is lost: whenever nothing can move any more, every job is final: watch(). That every run gets there is
     another search, for cycles (pan -l): there is none, so no fairness has to be assumed.

   What a failover may undo is not promised, and not checked: a submission, a cancel or a commit that was acknowledged
   but not yet replicated. The client submits again by its id, and the job is finished once more: at most one commit in
   the history that is left, and at most one more for each failover.

   A run of the script is one step here (d_step), since Redis runs nothing beside it. "lua:" names what a step stands
   for in queue.lua. Time has no numbers: a lease may run out and a job fall due at any moment, which covers every
   length and every jump of the clock.

   What the queue has but this model not: order, fairness, pools and batches (they choose which job is claimed, not what
   may become of it); limits; refused entries; another life for the dead; retention; counters; the job's events.
   tests/unit/test_queue.c, test_policy.c and test_dead.c have those.

   -DBUG_... plants a defect that must be found; each stands beside the right line. */

#ifndef JOBS
#define JOBS 1
#endif
#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef EVENTS
#define EVENTS 3
#endif
#ifndef MAX_APP
#define MAX_APP 2 /* max_attempts */
#endif
#ifndef MAX_INFRA
#define MAX_INFRA 2 /* max_attempts_infra */
#endif
#ifndef ADMITTERS
#define ADMITTERS 2
#endif
#define ENTRIES (2 * JOBS) /* each job may be submitted twice: entries 2j and 2j + 1 */
#define NO 255

mtype = { NONE, QUEUED, DELAYED, LEASED, RUNNING, UPLOADING, RETRY_WAIT, SUCCEEDED, DEAD, CANCELLED, EXPIRED };
mtype = { KEPT, FAILED, RELEASED, LOST }; /* the record's field "left" */
mtype = { ABSENT, WAITING, PENDING };     /* an entry: not in its door, not yet delivered, delivered */
mtype = { APP, APP_FINAL, INFRA };        /* causes */
mtype = { IDLE, CLAIMING, TAKEN, COMPUTED, UPLOADED, FAILING, RELEASING }; /* phases of a worker */
mtype = { NOTHING, CLAIM, BEAT, FINISH, FAIL, RELEASE };                   /* operations */
mtype = { OK, STALE, PAST }; /* answers; PAST: the fence was the last one, but the job is not held now */

#define HELD(s) (s == LEASED || s == RUNNING || s == UPLOADING)
#define WAITS(s) (s == DELAYED || s == RETRY_WAIT)
#define FINAL(s) (s == SUCCEEDED || s == DEAD || s == CANCELLED || s == EXPIRED)

/* ---- what Redis holds: a failover puts all of it back to an older moment */

typedef record {
    mtype state;
    mtype left;
    byte epoch, nonce, app, infra;
    byte by, inc;                          /* worker and incarnation of the last claim */
    byte died;                             /* worker + 1 that was the first to crash over it */
    bit ready, delayed, lease, held, live; /* is it in this index? */
    byte commits                           /* not in Redis: how often finish wrote, in this history */
};
typedef redis {
    record job[JOBS];
    mtype door[ENTRIES];
    bit sent[JOBS] /* not in Redis: was it submitted, in this history? */
};
redis q, copy;
bool copying; /* a replica stopped following at copy */
#define R q.job[j]

/* ---- what nobody can put back */

byte events = EVENTS; /* things that may still go wrong */
byte draws;           /* nonces drawn: each number is drawn once */
byte failovers;
byte commits[JOBS];   /* by all histories together */
byte blamed[JOBS];    /* errors of the job's own */
byte trouble;         /* faults of the fleet */
byte crashes;         /* deaths of workers that speak against the job in hand */
bool delay[JOBS];     /* not_before_ms is set */
bool late[JOBS];      /* deadline_ms is set, and over */

/* ---- what a worker process knows; the nonce is 0 when it has no job */

typedef process {
    mtype phase;
    mtype cause;
    byte job, epoch, nonce, inc;
    bit told /* the herald told the queue of this phase */
};
process w[WORKERS];
byte dead[WORKERS];   /* incarnation + 1 that the supervisor has yet to give back */
bit crashed[WORKERS]; /* it died of a crash */
bit poison;

/* A call that its sender gave up on and that Redis runs later all the same: it lay in a socket's buffer. */
typedef message {
    mtype op;
    mtype cause;
    byte by, job, epoch, nonce, inc
};
message slow;

/* ---- variables of one step */

hidden byte i, j;
hidden byte got;
hidden mtype answer;
hidden mtype from, was;

#if WORKERS == 2
#define WORKED_ON(r) (r.nonce && (w[0].nonce == r.nonce || w[1].nonce == r.nonce))
#else
#define WORKED_ON(r) (r.nonce && (w[0].nonce == r.nonce || w[1].nonce == r.nonce || w[2].nonce == r.nonce))
#endif
#if JOBS == 1
#define ANY_READY (q.job[0].ready)
#else
#define ANY_READY (q.job[0].ready || q.job[1].ready)
#endif
#ifdef ONLY_CRASHES /* in a random walk two crashes over one job would be rare */
#define EVENT false
#elif defined(WALK) /* a random walk would spend its events before anything is under way */
#define EVENT (events > 0 && draws > 0)
#else
#define EVENT (events > 0)
#endif

/* What a walk tells (spin -n or -t), and replay.py repeats on Redis: a line for each step, then what is in Redis. */
#define SHOW_JOB(r)                                                                                                    \
    printf("job %e %e %d %d %d %d %d %d %d %d %d\n", r.state, r.left, r.epoch, r.app, r.infra, r.ready, r.delayed,     \
           r.lease, r.held, r.live, r.died)
#if JOBS == 1
#define SHOW                                                                                                           \
    SHOW_JOB(q.job[0]);                                                                                                \
    printf("door %e %e\n", q.door[0], q.door[1])
#else
#define SHOW                                                                                                           \
    SHOW_JOB(q.job[0]);                                                                                                \
    SHOW_JOB(q.job[1]);                                                                                                \
    printf("door %e %e %e %e\n", q.door[0], q.door[1], q.door[2], q.door[3])
#endif

/* ---- the one place where a state changes; all of these act on job j */

/* lua: leave */
inline leave() {
    if
    :: R.state == QUEUED -> R.ready = 0
    :: WAITS(R.state) -> R.delayed = 0
    :: HELD(R.state) -> R.lease = 0; R.held = 0
    :: else
    fi
}

/* lua: enter */
inline enter() {
    if
    :: R.state == QUEUED -> R.ready = 1
    :: WAITS(R.state) -> R.delayed = 1
    :: HELD(R.state) -> R.lease = 1; R.held = 1
    :: else
    fi
}

/* lua: move, settle */
inline move(to) {
    from = R.state;
    assert(!FINAL(from));
    if
    :: HELD(from) && HELD(to) -> R.state = to
    :: else ->
        leave();
        R.state = to;
        enter();
        if
        :: FINAL(to) -> R.live = 0
        :: else
        fi;
        assert(R.ready == (to == QUEUED) && R.delayed == WAITS(to));
        assert(R.lease == HELD(to) && R.held == HELD(to) && R.live == !FINAL(to))
    fi
}

/* lua: fail_attempt, fail_final. The delay of full jitter is a stay in RETRY_WAIT; a delay of 0 one of no length. */
inline fail_attempt(cause_, left_) {
    if
    :: cause_ == INFRA -> R.infra++
    :: else -> R.app++
    fi;
#ifdef BUG_INFRA_IS_CHARGED_TO_THE_JOB
    if
    :: cause_ == INFRA -> R.infra--; R.app++
    :: else
    fi;
#endif
    R.left = left_;
    assert(R.app <= blamed[j] && R.infra <= trouble);
    assert(R.app <= MAX_APP && R.infra <= MAX_INFRA);
    if
    :: poison || cause_ == APP_FINAL || (cause_ == APP && R.app >= MAX_APP) || (cause_ == INFRA && R.infra >= MAX_INFRA) ->
        move(DEAD)
    :: !poison && cause_ == INFRA && R.infra == 1 -> move(QUEUED)
    :: else -> move(RETRY_WAIT)
    fi;
    poison = 0
}

/* ---- operations of the script */

/* lua: ops.admit, admit_one, admit_again. XACK finds the entry only while it is pending; the same run deletes it. */
inline op_admit(e) {
    printf("admit %d %d %d\n", e, delay[e / 2], late[e / 2]);
    j = e / 2;
    if
    :: q.door[e] == PENDING ->
        q.door[e] = ABSENT;
        if
#ifdef BUG_ADMIT_WITHOUT_DEDUP
        :: true ->
#else
        :: R.state == NONE ->
#endif
            assert(R.state == NONE);
            R.live = 1;
            if
            :: late[j] -> move(EXPIRED)
            :: delay[j] && !late[j] -> move(DELAYED)
            :: else -> move(QUEUED)
            fi
        :: else /* the same job */
        fi
#ifdef BUG_ADMIT_DELETES_WHAT_IT_DID_NOT_ADMIT
    :: else -> q.door[e] = ABSENT
#else
    :: else /* gone: another admitter has had it, or this history has not delivered it yet */
#endif
    fi;
    SHOW
}

/* lua: ops.claim with claimed_before, choose, claim_from, lease. Sets got. */
inline op_claim(by_, inc_, nonce_) {
    printf("claim %d %d %d\n", by_, inc_, nonce_);
    got = NO;
#ifndef BUG_CLAIM_FORGETS_ITS_NONCE
    for (j : 0 .. JOBS - 1) {
        if
        :: R.held && R.by == by_ && R.nonce == nonce_ -> got = j
        :: else
        fi
    }
#endif
    for (j : 0 .. JOBS - 1) {
        if
        :: got == NO && R.ready && late[j] -> move(EXPIRED)
        :: got == NO && R.ready && !late[j] ->
            R.epoch++;
            R.nonce = nonce_;
            R.by = by_;
            R.inc = inc_;
            R.left = KEPT;
            move(LEASED);
            got = j
        :: else
        fi
    };
    printf("answer %d\n", got);
    SHOW
}

/* lua: fenced. Sets answer. */
inline fenced(epoch_, nonce_) {
    if
#ifdef BUG_FENCE_WITHOUT_NONCE
    :: R.epoch != epoch_ -> answer = STALE
#else
    :: R.epoch != epoch_ || R.nonce != nonce_ -> answer = STALE
#endif
#ifndef BUG_FENCE_WITHOUT_STATE
    :: R.epoch == epoch_ && R.nonce == nonce_ && !HELD(R.state) -> answer = PAST
#endif
    :: else -> answer = OK
    fi
}

/* Whoever may write must be the last that claimed, and still hold the job. */
#define HOLDER(epoch_, nonce_) (HELD(R.state) && R.epoch == epoch_ && R.nonce == nonce_)

/* lua: ops.beat. A renewal puts a lost lease back. */
inline op_beat(job_, epoch_, nonce_, to) {
    printf("beat %d %d %d %e\n", job_, epoch_, nonce_, to);
    j = job_;
    fenced(epoch_, nonce_);
    if
    :: answer == OK ->
        assert(HOLDER(epoch_, nonce_));
        R.lease = 1;
        move(to)
    :: else
    fi;
    printf("answer %e\n", answer);
    SHOW
}

/* lua: ops.finish. Repeating it after success is success. */
inline op_finish(job_, epoch_, nonce_) {
    printf("finish %d %d %d\n", job_, epoch_, nonce_);
    j = job_;
    fenced(epoch_, nonce_);
#ifdef BUG_FINISH_WITHOUT_FENCE
    if
    :: R.state != NONE && !FINAL(R.state) -> answer = OK
    :: else
    fi;
#endif
    if
    :: answer == OK ->
        assert(HOLDER(epoch_, nonce_));
        R.commits++;
        commits[j]++;
        assert(R.commits == 1 && commits[j] <= 1 + failovers);
        move(SUCCEEDED)
    :: answer == PAST && R.state == SUCCEEDED -> answer = OK
    :: else
    fi;
    printf("answer %e\n", answer);
    SHOW
}

/* lua: ops.fail */
inline op_fail(job_, epoch_, nonce_, cause_) {
    printf("fail %d %d %d %e\n", job_, epoch_, nonce_, cause_);
    j = job_;
    fenced(epoch_, nonce_);
    if
    :: answer == OK -> assert(HOLDER(epoch_, nonce_)); fail_attempt(cause_, FAILED)
    :: answer == PAST && R.left == FAILED -> answer = OK
    :: else
    fi;
    printf("answer %e\n", answer);
    SHOW
}

/* lua: ops.release */
inline op_release(job_, epoch_, nonce_) {
    printf("release %d %d %d\n", job_, epoch_, nonce_);
    j = job_;
    fenced(epoch_, nonce_);
    if
    :: answer == OK ->
        assert(HOLDER(epoch_, nonce_));
#ifdef BUG_RELEASE_CHARGES
        fail_attempt(INFRA, RELEASED)
#else
        R.left = RELEASED;
        move(QUEUED)
#endif
    :: answer == PAST && R.left == RELEASED -> answer = OK
    :: else
    fi;
    printf("answer %e\n", answer);
    SHOW
}

/* lua: poison. Here every worker serves the pool. */
inline blame(by_) {
    if
    :: R.died == 0 -> R.died = by_ + 1
    :: R.died != 0 && R.died != by_ + 1 -> poison = 1; assert(crashes >= 2)
    :: else
    fi
}

/* lua: ops.release_all. Of a crash is to blame what was computed; what was only uploaded, when there is nothing else. */
inline op_release_all(by_, inc_, crash) {
    printf("release_all %d %d %d\n", by_, inc_, crash);
    was = NONE;
    for (j : 0 .. JOBS - 1) {
        if
        :: R.held && R.by == by_ && R.inc == inc_ && R.state != UPLOADING -> was = RUNNING
        :: else
        fi
    };
    for (j : 0 .. JOBS - 1) {
        if
#ifdef BUG_RELEASE_ALL_TAKES_FROM_THE_LIVING
        :: R.held && R.by == by_ ->
#else
        :: R.held && R.by == by_ && R.inc == inc_ ->
#endif
            assert(!WORKED_ON(R));
            if
#ifdef BUG_EVERY_DEATH_IS_BLAMED_ON_THE_JOB
            :: true -> blame(by_)
#else
            :: crash && (R.state != UPLOADING || was == NONE) -> blame(by_)
            :: else
#endif
            fi;
            fail_attempt(INFRA, LOST)
        :: else
        fi
    };
    SHOW
}

/* lua: ops.cancel. The state after it is the answer: R.state. */
inline op_cancel(job_) {
    printf("cancel %d\n", job_);
    j = job_;
    if
#ifdef BUG_CANCEL_OF_A_FINAL_JOB
    :: R.state != NONE -> move(CANCELLED)
#else
    :: R.state != NONE && !FINAL(R.state) -> move(CANCELLED)
#endif
    :: else
    fi;
    SHOW
}

/* lua: reap_lease */
inline op_reap_lease(job_) {
    printf("reap_lease %d\n", job_);
    j = job_;
    if
    :: late[j] -> move(EXPIRED)
    :: else -> fail_attempt(INFRA, LOST)
    fi;
    SHOW
}

/* lua: reap_delayed */
inline op_reap_delayed(job_) {
    printf("reap_delayed %d\n", job_);
    j = job_;
    if
    :: late[j] -> move(EXPIRED)
    :: else -> move(QUEUED)
    fi;
    SHOW
}

/* lua: reap_live, mend: is the record in the index of its state? */
#ifdef BUG_REAP_MISSES_A_LOST_LEASE
#define LEASE_LOST(r) false
#else
#define LEASE_LOST(r) (HELD(r.state) && !r.lease)
#endif
#define ORPHAN(r) (r.live && ((r.state == QUEUED && !r.ready) || (WAITS(r.state) && !r.delayed) || LEASE_LOST(r)))
inline op_reap_live(job_) {
    printf("reap_live %d\n", job_);
    j = job_;
    if
    :: late[j] -> move(EXPIRED)
    :: else ->
        if
        :: R.state == QUEUED -> R.ready = 1
        :: WAITS(R.state) -> R.delayed = 1
        :: else -> fail_attempt(INFRA, LOST)
        fi
    fi;
    SHOW
}

/* ---- the client: submits, perhaps twice, may cancel */

proctype client(byte me) {
    bool repeated, cancelled;
    if
    :: d_step { EVENT -> events--; delay[me] = true }
    :: true
    fi;
    d_step { q.door[2 * me] = WAITING; q.sent[me] = 1; printf("submit %d\n", 2 * me); SHOW }
end:
    do
    /* XADD's reply was lost: it is sent again, a second entry with the same bytes (queue_command of queue.c) */
    :: d_step { EVENT && !repeated -> events--; repeated = true; q.door[2 * me + 1] = WAITING; q.sent[me] = 1;
            printf("submit %d\n", 2 * me + 1); SHOW }
    /* A failover lost the submission: it is sent again by its id (PROTOCOL.md: the id is the idempotency key). */
    :: d_step { !q.sent[me] -> q.door[2 * me] = WAITING; q.sent[me] = 1; printf("submit %d\n", 2 * me); SHOW }
    :: d_step { EVENT && !cancelled && q.job[me].state != NONE ->
            events--;
            cancelled = true;
            was = q.job[me].state;
            op_cancel(me);
            assert(FINAL(R.state) && (R.state == SUCCEEDED) == (R.commits == 1));
            assert(R.state == (FINAL(was) -> was : CANCELLED))
        }
    /* a deadline passes */
    :: d_step { EVENT && !late[me] -> events--; late[me] = true; printf("late %d\n", me) }
    od
}

/* ---- admission: queue_admit.c. An entry is delivered to one admitter (XREADGROUP), or taken over from one that is
   slow or dead (XAUTOCLAIM), so that two may have it; then the script runs. */

#define TAKE(e)                                                                                                        \
    :: d_step { has == NO && q.door[e] != ABSENT -> q.door[e] = PENDING; has = e; printf("deliver %d\n", e); SHOW }

proctype admitter() {
    byte has = NO;
end:
    do
    TAKE(0)
    TAKE(1)
#if JOBS > 1
    TAKE(2)
    TAKE(3)
#endif
    :: d_step { has != NO -> op_admit(has); has = NO }
    :: d_step { has != NO && EVENT -> events--; op_admit(has) } /* the reply was lost: sent again */
    :: d_step { has != NO && EVENT -> events--; has = NO }      /* it dies, or the entry never reached it */
    od
}

/* ---- a worker's leader: job_run.c, herald.c, deliver.c. One that denoises a job while another uploads is two here. */

#define W w[me]
#define LAST_WORD (W.phase == UPLOADED || W.phase == FAILING || W.phase == RELEASING)

inline drop_job() {
    W.phase = IDLE;
    W.cause = APP;
    W.job = 0;
    W.epoch = 0;
    W.nonce = 0;
    W.told = 0
}

inline draw() {
    draws++;
    W.nonce = draws
}

inline take_claimed() {
    if
    :: got != NO -> W.phase = TAKEN; W.job = got; W.epoch = q.job[got].epoch
    :: else -> drop_job()
    fi
}

/* Progress as the herald tells it; any other answer than ok stops the work, and nothing more is said. */
inline beat(to) {
    op_beat(W.job, W.epoch, W.nonce, to);
    if
    :: answer == OK -> W.told = 1
    :: else -> drop_job()
    fi
}

inline say_last_word() {
    if
    :: W.phase == UPLOADED -> op_finish(W.job, W.epoch, W.nonce); assert(answer != OK || R.state == SUCCEEDED)
    :: W.phase == FAILING -> op_fail(W.job, W.epoch, W.nonce, W.cause)
    :: W.phase == RELEASING -> op_release(W.job, W.epoch, W.nonce)
    fi
}

inline leave_in_the_socket(op_) {
    slow.op = op_;
    slow.cause = W.cause;
    slow.by = me;
    slow.inc = W.inc;
    slow.job = W.job;
    slow.epoch = W.epoch;
    slow.nonce = W.nonce
}

inline fails_by(cause_) {
    events--;
    W.phase = FAILING;
    W.told = 0;
    W.cause = cause_
}

inline dies(crash) {
    events--;
    trouble++;
    dead[me] = W.inc + 1;
    crashed[me] = crash;
    W.inc++;
    drop_job()
}

proctype worker(byte me) {
end:
    do
    /* A claim; its reply may be lost, or it may run only later: then it is sent again with the same nonce. */
    :: d_step { W.phase == IDLE && ANY_READY -> draw(); op_claim(me, W.inc, W.nonce); take_claimed() }
    :: d_step { W.phase == IDLE && ANY_READY && EVENT ->
            events--; draw(); op_claim(me, W.inc, W.nonce); W.phase = CLAIMING }
    :: d_step { W.phase == IDLE && ANY_READY && EVENT && slow.op == NOTHING ->
            events--; trouble++; draw(); leave_in_the_socket(CLAIM); W.phase = CLAIMING }
    :: d_step { W.phase == CLAIMING -> op_claim(me, W.inc, W.nonce); take_claimed() }

    /* The work. The herald tells it from its own thread, so it may lag, or not come to it at all. */
    :: d_step { W.phase == TAKEN && !W.told -> beat(RUNNING) }
    :: d_step { W.phase == TAKEN -> W.phase = COMPUTED; W.told = 0 }
    :: d_step { W.phase == COMPUTED && !W.told -> beat(UPLOADING) }
    :: d_step { W.phase == COMPUTED -> W.phase = UPLOADED; W.told = 0 }
    :: d_step { W.phase == TAKEN && EVENT && slow.op == NOTHING -> events--; leave_in_the_socket(BEAT) }

    /* It goes wrong: by the job, by the fleet, by an order to drain. */
    :: d_step { (W.phase == TAKEN || W.phase == COMPUTED) && EVENT -> fails_by(APP); blamed[W.job]++ }
    :: d_step { W.phase == TAKEN && EVENT -> fails_by(APP_FINAL); blamed[W.job]++ }
    :: d_step { (W.phase == TAKEN || W.phase == COMPUTED) && EVENT -> fails_by(INFRA); trouble++ }
    :: d_step { (W.phase == TAKEN || W.phase == COMPUTED) && EVENT ->
            events--; W.phase = RELEASING; W.told = 0 }

    /* finish, fail or release; its reply may be lost, or it may run only later: then it is said again. */
    :: d_step { LAST_WORD -> say_last_word(); drop_job() }
    :: d_step { LAST_WORD && EVENT -> events--; say_last_word() }
    :: d_step { LAST_WORD && EVENT && slow.op == NOTHING ->
            events--;
            leave_in_the_socket((W.phase == UPLOADED -> FINISH : (W.phase == FAILING -> FAIL : RELEASE))) }

    /* It is killed, at any point; its next incarnation starts. */
    :: d_step { W.phase != IDLE && EVENT -> dies(0) }
#ifdef CRASHES
    :: d_step { W.phase != IDLE && events > 0 -> dies(1); crashes++ }
#endif
    od
}

/* ---- the supervisor gives a dead incarnation's jobs back; if it is late, the reaper was faster */

proctype supervisor(byte me) {
end:
    do
    :: d_step { dead[me] -> op_release_all(me, dead[me] - 1, crashed[me]); dead[me] = 0; crashed[me] = 0 }
    :: d_step { dead[me] && EVENT -> op_release_all(me, dead[me] - 1, crashed[me]); events-- } /* the reply was lost */
    od
}

/* ---- the reaper, of one job: lua: ops.reap. A lease runs out when nobody renews it; under a holder that is alive that
   takes an event: it was stalled (and wakes up later), its connection was cut, or the clock jumped. */

proctype reaper(byte me) {
end:
    do
    :: d_step { q.job[me].lease && !WORKED_ON(q.job[me]) -> op_reap_lease(me) }
    :: d_step { q.job[me].lease && WORKED_ON(q.job[me]) && EVENT -> events--; trouble++; op_reap_lease(me) }
    :: d_step { q.job[me].delayed -> op_reap_delayed(me) }
    :: d_step { ORPHAN(q.job[me]) || (q.job[me].live && late[me]) -> op_reap_live(me) }
    /* An index loses the job (by hand, say): what reap_live is for. */
    :: d_step { EVENT && (q.job[me].ready || q.job[me].delayed || q.job[me].lease) ->
            events--; trouble++; q.job[me].ready = 0; q.job[me].delayed = 0; q.job[me].lease = 0;
            printf("misplace %d\n", me); SHOW }
    od
}

/* ---- Redis itself */

inline copy_all(to, source) {
    for (i : 0 .. JOBS - 1) {
        to.job[i].state = source.job[i].state;
        to.job[i].left = source.job[i].left;
        to.job[i].epoch = source.job[i].epoch;
        to.job[i].nonce = source.job[i].nonce;
        to.job[i].app = source.job[i].app;
        to.job[i].infra = source.job[i].infra;
        to.job[i].by = source.job[i].by;
        to.job[i].inc = source.job[i].inc;
        to.job[i].died = source.job[i].died;
        to.job[i].ready = source.job[i].ready;
        to.job[i].delayed = source.job[i].delayed;
        to.job[i].lease = source.job[i].lease;
        to.job[i].held = source.job[i].held;
        to.job[i].live = source.job[i].live;
        to.job[i].commits = source.job[i].commits;
        to.sent[i] = source.sent[i]
    }
    for (i : 0 .. ENTRIES - 1) {
        to.door[i] = source.door[i]
    }
}

/* So that the same situation is the same state. */
inline forget_copy() {
    for (i : 0 .. JOBS - 1) {
        copy.job[i].state = NONE;
        copy.job[i].left = KEPT;
        copy.job[i].epoch = 0;
        copy.job[i].nonce = 0;
        copy.job[i].app = 0;
        copy.job[i].infra = 0;
        copy.job[i].by = 0;
        copy.job[i].inc = 0;
        copy.job[i].died = 0;
        copy.job[i].ready = 0;
        copy.job[i].delayed = 0;
        copy.job[i].lease = 0;
        copy.job[i].held = 0;
        copy.job[i].live = 0;
        copy.job[i].commits = 0;
        copy.sent[i] = 0
    }
    for (i : 0 .. ENTRIES - 1) {
        copy.door[i] = ABSENT
    }
}

inline run_slow() {
    if
    :: slow.op == CLAIM -> op_claim(slow.by, slow.inc, slow.nonce)
    :: slow.op == BEAT -> op_beat(slow.job, slow.epoch, slow.nonce, RUNNING)
    :: slow.op == FINISH -> op_finish(slow.job, slow.epoch, slow.nonce)
    :: slow.op == FAIL -> op_fail(slow.job, slow.epoch, slow.nonce, slow.cause)
    :: slow.op == RELEASE -> op_release(slow.job, slow.epoch, slow.nonce)
    fi;
    slow.op = NOTHING;
    slow.cause = APP;
    slow.by = 0;
    slow.inc = 0;
    slow.job = 0;
    slow.epoch = 0;
    slow.nonce = 0
}

/* What Redis acknowledged after the copy is lost. Each job may then be held by nobody: a fault for each. */
proctype server() {
end:
    do
    :: d_step { slow.op != NOTHING -> run_slow() }
    :: d_step { EVENT && !copying -> copy_all(copy, q); copying = true; events--; printf("copy\n") }
    :: d_step { copying ->
            copy_all(q, copy); forget_copy(); copying = false; failovers++; trouble = trouble + JOBS;
            printf("failover\n"); SHOW }
    od
}

/* ---- nothing can move any more: then every job is final */

#if JOBS == 1
#define ALL_FINAL FINAL(q.job[0].state)
#else
#define ALL_FINAL (FINAL(q.job[0].state) && FINAL(q.job[1].state))
#endif

proctype watch() {
end:
    timeout -> assert(ALL_FINAL)
}

init {
    d_step {
        for (i : 0 .. JOBS - 1) {
            q.job[i].state = NONE;
            q.job[i].left = KEPT
        }
        for (i : 0 .. ENTRIES - 1) {
            q.door[i] = ABSENT
        }
        for (i : 0 .. WORKERS - 1) {
            w[i].phase = IDLE;
            w[i].cause = APP
        }
        forget_copy();
        slow.op = NOTHING;
        slow.cause = APP
    }
    atomic {
        for (i : 0 .. JOBS - 1) {
            run client(i);
            run reaper(i)
        }
        for (i : 0 .. WORKERS - 1) {
            run worker(i);
            run supervisor(i)
        }
        for (i : 1 .. ADMITTERS) {
            run admitter()
        }
        run server();
        run watch()
    }
}
