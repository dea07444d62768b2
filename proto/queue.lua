-- queue.lua: every change of a job's state, each an atomic run of this one script. PROTOCOL.md lists the operations.
--
-- keys[1] is the prefix "dit:{QUEUE}:"; all keys below it share the queue's hash tag. argv[1] names the operation.
-- A state changes in move() alone, time comes from now() alone, and no run handles more than K entries.
--
-- Redis keeps it as a function, made once (FUNCTION LOAD, FCALL), or runs all of its text with each operation (EVALSHA), where
-- access control or a server's age leave no other way. So what belongs to one operation is in `run`, which each finds empty.
local P, argv, run
local call, char, format, tonumber, floor, min, max -- bound with each operation: a function's making has no globals
local K = 64
local CLASSES = { 'high', 'normal', 'low' }
local HELD = { LEASED = true, RUNNING = true, UPLOADING = true }
local WAITING = { DELAYED = true, RETRY_WAIT = true }
local FINAL = { SUCCEEDED = true, DEAD = true, CANCELLED = true, EXPIRED = true }
local STATE = { QUEUED = 1, DELAYED = 2, LEASED = 3, RUNNING = 4, UPLOADING = 5, RETRY_WAIT = 6,
                SUCCEEDED = 7, DEAD = 8, CANCELLED = 9, EXPIRED = 10 } -- numbers of job.proto

-- Settings that `conf` may override; PROTOCOL.md explains them.
local SETTINGS = {
  retention_ms = 86400000, events_ms = 600000, max_attempts = 3, max_attempts_infra = 20, backoff_ms = 1000, backoff_cap_ms = 60000,
  check_ms = 60000, dlq_max = 10000, outbox_max = 10000, max_backlog_ms = 0, max_speed = 64,
  turn_normal = 4, turn_low = 16,
}
local EVENT_MAX = '1000' -- of one job's stream
local SERVES_MS = 60000 -- how long a worker counts as serving a pool after it last said so
local CALLBACK_KEEP_MS = 86400000 -- how long a callback that is due can wait for its turn
local OVERLOADED_KEEP_MS = 600000 -- how long it is told that a submission was one too many: they may come by the thousand

-- As Redis takes numbers. What is passed to it as one is written with 17 digits, which takes as long as a small command.
local function int(n)
  if n > -2 ^ 53 and n < 2 ^ 53 then return format('%d', n) end
  return format('%.0f', n)
end
local function real(n) return n % 1 == 0 and int(n) or n end

local function num(text) return text and tonumber(text) or 0 end -- what is not there is 0

local function conf(name)
  if not run.conf then
    run.conf = {}
    local all = call('HGETALL', P .. 'conf')
    for i = 1, #all, 2 do run.conf[all[i]] = tonumber(all[i + 1]) end
  end
  return run.conf[name] or SETTINGS[name]
end

local function now() -- milliseconds, the same during one run
  if not run.now then
    local t = call('TIME')
    run.now, run.micros = t[1] * 1000 + floor(t[2] / 1000), t[2] % 1000
    run.now_text = int(run.now)
  end
  return run.now
end
local function now_text() return now() and run.now_text end
local function next_rank() -- microseconds, growing, as text: order of admission
  run.ticks = (run.ticks or now() * 1000 + run.micros) + 1
  return int(run.ticks)
end

-- Where all of this text runs with each operation, what costs is making functions: each looks for the locals that it uses among
-- those of the function around it, one by one. So there are functions around functions, whose bodies stand at the left margin:
-- queue() has what all operations need, and the groups of operations in it are made in turn until one has what is asked for.
local function queue()

-- ---- protobuf, as far as events and failed results need it

local function varint(n)
  if n < 128 then return char(n) end
  local low = n % 128
  return char(low + 128) .. varint((n - low) / 128)
end
local function pb_number(field, n) return n == 0 and '' or n < 128 and char(field * 8, n) or char(field * 8) .. varint(n) end
local function pb_string(field, s) return s == '' and '' or varint(field * 8 + 2) .. varint(#s) .. s end
local function pb_double(field, x) return x == 0 and '' or varint(field * 8 + 1) .. struct.pack('<d', x) end
local function pb_error(e)
  -- Text from system calls may hold anything; a protobuf string must be UTF-8.
  return pb_string(1, e.code) .. pb_string(2, (e.message:gsub('[\128-\255]', '?'))) .. pb_number(3, e.retryable and 1 or 0)
end
local function pb_result(id, state, e, attempt) -- ditfleet.v1.Result
  return pb_string(1, id) .. pb_number(2, STATE[state]) .. pb_string(4, pb_error(e)) .. pb_number(8, attempt)
end
local function pb_event(r, e, eta) -- ditfleet.v1.Event
  return pb_string(1, r.id) .. pb_number(2, STATE[r.state]) .. pb_string(3, r.stage) .. pb_number(4, r.step)
    .. pb_number(5, r.steps) .. pb_double(6, eta or 0) .. pb_number(7, now())
    .. (e and pb_string(8, pb_error(e)) or '') .. pb_number(9, r.epoch)
end

-- ---- the record

local function record_key(tenant, id) return P .. 'job:' .. tenant .. ':' .. id end
local function member(r) return r.tenant .. ':' .. r.id end

-- What operations need of a record; nil: no such job. The second answer has the values of further fields, from MORE on.
local MORE = 15
local function load(tenant, id, ...)
  local v = call('HMGET', record_key(tenant, id), 'state', 'epoch', 'nonce', 'pool', 'class', 'worker', 'stage', 'step', 'steps',
    'gpu_ms', 'deadline_ms', 'rank', 'due_ms', 'callback', ...)
  if (v[1] or '') == '' then return end
  return {
    tenant = tenant, id = id, state = v[1], epoch = num(v[2]), nonce = v[3] or '', pool = v[4] or '', class = v[5] or '',
    worker = v[6] or '', stage = v[7] or '', step = num(v[8]), steps = num(v[9]), gpu_ms = num(v[10]), deadline_ms = num(v[11]),
    rank = v[12] or '0', due_ms = num(v[13]), callback = v[14] or '',
  }, v
end
local function load_member(m, ...)
  local tenant, id = m:match('^([^:]*):(.*)$')
  return load(tenant or '', id or '', ...)
end

-- ---- figures: `stats`, and each tenant's hash
-- A run that handles many jobs changes the same few again and again: they are added up and written once, at its end.
-- None falls below nothing: jobs that an older script let in leave without having been counted.

local function add_number(k, field, by) -- the sum
  local n = call('HINCRBY', k, field, int(by))
  if n < 0 then call('HSET', k, field, '0') end
  return max(0, n)
end

-- A tenant as it was when first asked for, with what the run did since.
local function read_tenant(tenant)
  local t = run.tenants[tenant]
  if t then return t end
  local v = call('HMGET', P .. 'tenant:' .. tenant, 'ready', 'gpu_ms', 'vtime', 'rate', 'burst_ms', 'max_queued_ms', 'spent_ms',
    'spent_at')
  t = { ready = num(v[1]), gpu_ms = num(v[2]), vtime = num(v[3]), rate = num(v[4]), burst_ms = num(v[5]),
        max_queued_ms = num(v[6]), spent_ms = num(v[7]), spent_at = num(v[8]), changed = false }
  run.tenants[tenant] = t
  return t
end
local function add_tenant(tenant, field, by) -- the sum
  local t = run.tenants[tenant]
  if not t then return add_number(P .. 'tenant:' .. tenant, field, by) end
  t[field], t.changed = max(0, t[field] + by), true
  return t[field]
end

-- `stats` counts what the sizes of the indexes do not tell, see ops.stats; and of each pool the jobs in each place, and what they
-- cost, see ops.pools.
local COUNTED = { RUNNING = true, UPLOADING = true, RETRY_WAIT = true }
local PLACE = { QUEUED = 'queued', DELAYED = 'delayed', RETRY_WAIT = 'delayed',
                LEASED = 'working', RUNNING = 'working', UPLOADING = 'working' }
local PLACE_MS = { queued = 'queued_ms', delayed = 'delayed_ms', working = 'working_ms' }
local function count(field, by) run.counts[field] = (run.counts[field] or 0) + by end
local function count_places(r, from, to)
  local p = run.pools[r.pool]
  if not p then
    p = { queued = 0, queued_ms = 0, delayed = 0, delayed_ms = 0, working = 0, working_ms = 0 }
    run.pools[r.pool] = p
  end
  if from then p[from], p[PLACE_MS[from]] = p[from] - 1, p[PLACE_MS[from]] - r.gpu_ms end
  if to then p[to], p[PLACE_MS[to]] = p[to] + 1, p[PLACE_MS[to]] + r.gpu_ms end
end

local function write_figures()
  local stats = P .. 'stats'
  for field, by in pairs(run.counts) do add_number(stats, field, by) end
  for pool, places in pairs(run.pools) do
    for place, by in pairs(places) do
      if by ~= 0 then add_number(stats, place .. ':' .. pool, by) end
    end
  end
  for tenant, t in pairs(run.tenants) do
    if t.changed then
      call('HSET', P .. 'tenant:' .. tenant, 'ready', int(t.ready), 'gpu_ms', int(t.gpu_ms), 'vtime', real(t.vtime))
      if t.rate > 0 then call('HSET', P .. 'tenant:' .. tenant, 'spent_ms', real(t.spent_ms), 'spent_at', int(t.spent_at)) end
    end
  end
end

local function tell(r, e, eta) -- an event for whoever watches this job
  local k = P .. 'ev:' .. r.tenant .. ':' .. r.id
  call('XADD', k, 'MAXLEN', '~', EVENT_MAX, '*', 'event', pb_event(r, e, eta))
  if FINAL[r.state] then call('PEXPIRE', k, int(r.keep_ms or conf('events_ms'))) end
end

local function wake(pool)
  if run.woken[pool] then return end
  run.woken[pool] = true
  call('XADD', P .. 'wake', 'MAXLEN', '~', '1000', '*', 'pool', pool)
end

-- ---- the ready set and the ring of tenants
-- ring:<pool>:<class> orders the tenants that have ready jobs there by virtual time: GPU-milliseconds charged / weight.
-- A tenant that comes back from idling starts at the clock of the last claim, so it cannot save up a claim on the fleet.
-- Scores in a ring may lag behind, and a tenant may stay in one that has nothing ready: claim mends both when it meets them.
-- A tenant above its rate leaves the rings in which claim meets it for limited, until it may claim again: it is in no one's way.

local function ready_key(r) return P .. 'ready:' .. r.pool .. ':' .. r.class .. ':' .. r.tenant end
local function ring_key(pool, class) return P .. 'ring:' .. pool .. ':' .. class end
local function vclock() return num(call('GET', P .. 'vclock')) end

-- What a tenant has left: its place in the rings and, with a rate, what it spent of its bucket, which holds burst_ms
-- GPU-milliseconds and fills at the rate. One claim may overdraw it, so that a job may cost more than a burst; then
-- `again` is when it may claim next.
local function read_purse(tenant)
  local t = read_tenant(tenant)
  local p = { tenant = tenant, vtime = t.vtime, spent = 0, pool = false, again = false }
  if t.rate > 0 then
    p.spent = max(0, t.spent_ms - t.rate * max(0, now() - t.spent_at))
    if p.spent > 0 and p.spent >= t.burst_ms then p.again = floor(now() + (p.spent - t.burst_ms) / t.rate) + 1 end
  end
  return p
end

-- A tenant that had nothing to claim has nothing to make up for.
local function catch_up(t)
  local clock = vclock()
  if t.vtime < clock then t.vtime, t.changed = clock, true end
end

-- Back into the ring; the time it was kept from claiming counts as idling.
local function end_limit(pool, class, tenant)
  if call('ZREM', P .. 'limited', pool .. ':' .. class .. ':' .. tenant) == 0 then return end
  local t = read_tenant(tenant)
  catch_up(t)
  call('ZADD', ring_key(pool, class), real(t.vtime), tenant)
  wake(pool)
end

-- due tells since when a job that had to wait could be claimed, for ops.pools, which reads no record: whoever looks at the
-- figures need not be let near jobs.
local function join_ready(r)
  local ready = ready_key(r)
  if call('ZADD', ready, r.rank, member(r)) == 0 then return end
  if r.due_ms > 0 then call('HSET', P .. 'due', member(r), int(r.due_ms)) end
  if add_tenant(r.tenant, 'ready', 1) == 1 then catch_up(read_tenant(r.tenant)) end
  if run.ringed[ready] or call('ZCARD', ready) > 1 then return end
  run.ringed[ready] = true
  call('ZADD', ring_key(r.pool, r.class), real(read_tenant(r.tenant).vtime), r.tenant)
  wake(r.pool) -- else by what is in ready already: of it whoever found nothing to claim has been told since
end
local function leave_ready(r)
  if r.due_ms > 0 then call('HDEL', P .. 'due', member(r)) end
  if call('ZREM', ready_key(r), member(r)) == 1 then add_tenant(r.tenant, 'ready', -1) end
end

-- ---- the one place where a state changes
-- set: further fields {name, value, ...}; e: the error that goes with it, if any. A record is in exactly one index of
-- its state (ready, delayed, or lease with held), and in live until it is final.

local function leave(r)
  if r.state == 'QUEUED' then leave_ready(r)
  elseif WAITING[r.state] then call('ZREM', P .. 'delayed', member(r))
  elseif HELD[r.state] then
    call('ZREM', P .. 'lease', member(r))
    call('HDEL', P .. 'held:' .. r.worker, member(r))
  end
end
local function enter(r)
  if r.state == 'QUEUED' then join_ready(r)
  elseif WAITING[r.state] then call('ZADD', P .. 'delayed', int(r.due_ms), member(r))
  elseif HELD[r.state] then
    call('ZADD', P .. 'lease', r.lease_ms, member(r))
    call('HSET', P .. 'held:' .. r.worker, member(r), r.holder)
  end
end

-- A callback is in outbox, and in outbox_due:<tenant> by when it is to be tried (next), until it was made or given up.
-- outbox_ring orders the tenants that have some: by when the next is due, or since when they wait for their turn.
-- outbox_tries counts the tries that are charged; outbox_hold only grows, and proves who has it in hand. What finds no room is
-- given up at once, so that it shows.
local function due_key(tenant) return P .. 'outbox_due:' .. tenant end
local function put_callback(tenant, entry, at)
  call('ZADD', due_key(tenant), int(at), entry)
  call('ZADD', P .. 'outbox_ring', 'LT', int(at), tenant)
end
-- The record must outlive the callback, which may have to wait for its turn after it fell due.
local function keep_record(key, ms) call('PEXPIRE', key, int(ms + CALLBACK_KEEP_MS), 'GT') end
local function give_up_callback(c, code, message, shown)
  call('XADD', P .. 'dlq', 'MAXLEN', '~', conf('dlq_max'), '*', 'tenant', c.tenant, 'id', c.id, 'code', code, 'error', message,
    'callback', shown)
end
local function post_callback(r, k)
  if call('ZCARD', due_key(r.tenant)) >= conf('outbox_max') then
    local shown = r.callback:match('^[^?#]*')
    return give_up_callback(r, 'no_memory', 'the callback was not tried: its tenant has too many waiting (outbox_max)', shown)
  end
  local of = call('HMGET', k, 'entry', 'life')
  local entry = call('XADD', P .. 'outbox', '*', 'tenant', r.tenant, 'id', r.id, 'entry', of[1] or '', 'state', r.state,
    'url', r.callback, 'life', of[2] or '')
  put_callback(r.tenant, entry, now())
  keep_record(k, 0)
end

local function settle(r, k) -- a record that became final
  local retention = conf('retention_ms')
  call('ZREM', P .. 'live', member(r))
  call('PEXPIRE', k, int(retention))
  count(r.state, 1)
  add_tenant(r.tenant, 'gpu_ms', -r.gpu_ms)
  if r.callback ~= '' then post_callback(r, k) end
end
local function move(r, state, set, e, eta)
  local k, from, n = record_key(r.tenant, r.id), r.state, #set
  local stays = HELD[from] and HELD[state]
  if from ~= '' and not stays then leave(r) end
  if COUNTED[from] then count(from, -1) end
  if COUNTED[state] then count(state, 1) end
  if PLACE[from] ~= PLACE[state] then count_places(r, PLACE[from], PLACE[state]) end
  r.state = state
  if not stays then enter(r) end
  -- The payload may hold secrets (headers, signed URLs). DEAD keeps it: a dead job can be looked into.
  if FINAL[state] and state ~= 'DEAD' then set[n + 1], set[n + 2] = 'payload', '' end
  call('HSET', k, 'state', state, 'updated_ms', now_text(), unpack(set))
  if FINAL[state] then settle(r, k) end
  -- A stream takes 4 KB from its first entry on: a job that waits to be claimed for the first time has none.
  if from ~= '' or FINAL[state] then tell(r, e, eta) end
end

local function fail_final(r, state, e, set) -- DEAD, CANCELLED or EXPIRED
  if state == 'DEAD' then
    call('XADD', P .. 'dlq', 'MAXLEN', '~', conf('dlq_max'), '*', 'tenant', r.tenant, 'id', r.id,
      'code', e.code, 'error', e.message)
  end
  set = set or {}
  for _, v in ipairs({ 'error_code', e.code, 'error', e.message, 'result', pb_result(r.id, state, e, r.epoch) }) do
    set[#set + 1] = v
  end
  move(r, state, set, e)
end
local function expire(r, set)
  fail_final(r, 'EXPIRED', { code = 'expired', message = 'the deadline passed before the job was finished' }, set)
end

-- An attempt failed. cause: 'app' counts against the job, 'infra' against the fleet; poison: it is the last. Full jitter: random is
-- in [0, 1).
local function fail_attempt(r, cause, e, random, left, poison)
  local field, k = 'attempts_' .. cause, record_key(r.tenant, r.id)
  local v = call('HMGET', k, field, 'max_attempts')
  local n, its_most = num(v[1]) + 1, num(v[2])
  local most = cause == 'infra' and conf('max_attempts_infra') or (its_most > 0 and its_most or conf('max_attempts'))
  call('HSET', k, field, int(n), 'left', left)
  if n >= most or poison or (cause == 'app' and not e.retryable) then return fail_final(r, 'DEAD', e) end
  count('retries', 1)
  local delay = floor(random * min(conf('backoff_cap_ms'), conf('backoff_ms') * 2 ^ (n - 1)))
  if cause == 'infra' and n == 1 then delay = 0 end
  r.stage, r.step = '', 0
  local set = { 'error_code', e.code, 'error', e.message, 'stage', '', 'step', 0 }
  if delay == 0 then return move(r, 'QUEUED', set, e) end
  r.due_ms = now() + delay
  set[#set + 1], set[#set + 2] = 'due_ms', int(r.due_ms)
  move(r, 'RETRY_WAIT', set, e)
end

local function due(name, n) return call('ZRANGEBYSCORE', P .. name, '-inf', now_text(), 'LIMIT', '0', int(n or K)) end
local function next_check(r)
  local at = now() + conf('check_ms')
  return r.deadline_ms > 0 and min(at, r.deadline_ms) or at
end

local function begin(r) -- a record that is not final from now on
  call('ZADD', P .. 'live', int(next_check(r)), member(r))
  add_tenant(r.tenant, 'gpu_ms', r.gpu_ms)
end

-- ---- operations

local ops = {}

local function registry()

-- doors: registers the default tenant, opens what door is missing; {name, weight, waiting, ready, gpu_ms, rate, burst_ms,
-- max_queued_ms, ...}
function ops.doors()
  call('HSETNX', P .. 'tenants', 'default', 1)
  local all, out = call('HGETALL', P .. 'tenants'), {}
  for i = 1, #all, 2 do
    redis.pcall('XGROUP', 'CREATE', P .. 'in:' .. all[i], 'admit', '0', 'MKSTREAM')
    out[#out + 1], out[#out + 2] = all[i], all[i + 1]
    out[#out + 1] = call('XLEN', P .. 'in:' .. all[i])
    local t = call('HMGET', P .. 'tenant:' .. all[i], 'ready', 'gpu_ms', 'rate', 'burst_ms', 'max_queued_ms')
    out[#out + 1] = max(0, tonumber(t[1]) or 0)
    for f = 2, 5 do out[#out + 1] = t[f] or '0' end
  end
  return out
end

-- tenant <name> <weight> <rate> <burst_ms> <max_queued_ms>: registers it; '' leaves a value as it is
local LIMITS = { 'rate', 'burst_ms', 'max_queued_ms' }
function ops.tenant()
  local name = argv[2]
  if argv[3] ~= '' then call('HSET', P .. 'tenants', name, argv[3]) else call('HSETNX', P .. 'tenants', name, 1) end
  for i, field in ipairs(LIMITS) do
    local value = argv[3 + i] or ''
    if value ~= '' then call('HSET', P .. 'tenant:' .. name, field, value) end
  end
  for _, pool in ipairs(call('HKEYS', P .. 'models')) do -- what held it up may hold no more
    for _, class in ipairs(CLASSES) do end_limit(pool, class, name) end
  end
  return ops.doors()
end

-- publish <name> <version> [<worker>]: the version becomes what the bare name means; the worker serves it
function ops.publish()
  local pool = argv[2] .. '@' .. argv[3]
  call('HSET', P .. 'models', pool, int(now()), argv[2], argv[3])
  if not argv[4] then return end
  call('ZREMRANGEBYSCORE', P .. 'serves:' .. pool, '-inf', now() - SERVES_MS)
  call('ZADD', P .. 'serves:' .. pool, now(), argv[4])
end

-- withdraw <name> <version>: the bare name falls back to the version published last
function ops.withdraw()
  local k, name = P .. 'models', argv[2]
  call('HDEL', k, name .. '@' .. argv[3])
  if call('HGET', k, name) ~= argv[3] then return end
  local all, best, at = call('HGETALL', k), nil, -1
  for i = 1, #all, 2 do
    local version = all[i]:sub(1, #name + 1) == name .. '@' and all[i]:sub(#name + 2)
    if version and tonumber(all[i + 1]) > at then best, at = version, tonumber(all[i + 1]) end
  end
  if best then call('HSET', k, name, best) else call('HDEL', k, name) end
end

-- set <name> <value>
function ops.set()
  if not SETTINGS[argv[2]] then return false end
  call('HSET', P .. 'conf', argv[2], argv[3])
  return 'ok'
end

end
local function admission()

-- A refused entry: dlq, and a result under "@<entry>"; under the id too when no job has it. One too many is no dead letter: it
-- would push out those that need somebody's eyes.
local function refuse(tenant, a, e)
  local keep_ms = conf('retention_ms')
  if e.code == 'overloaded' then keep_ms = min(keep_ms, OVERLOADED_KEEP_MS)
  else
    call('XADD', P .. 'dlq', 'MAXLEN', '~', conf('dlq_max'), '*', 'tenant', tenant, 'id', a.id, 'entry', a.entry,
      'code', e.code, 'error', e.message, 'size', a.size, 'payload', a.payload)
  end
  count('refused', 1)
  for _, name in ipairs({ '@' .. a.entry, a.id }) do
    local k = record_key(tenant, name)
    if name ~= '' and (call('EXISTS', k) == 0 or call('HGET', k, 'refused') == '1') then
      call('DEL', k)
      call('HSET', k, 'state', 'DEAD', 'refused', 1, 'entry', a.entry, 'created_ms', now_text(), 'updated_ms', now_text(),
        'error_code', e.code, 'error', e.message, 'result', pb_result(a.id, 'DEAD', e, 0))
      call('PEXPIRE', k, int(keep_ms))
      tell({ tenant = tenant, id = name, state = 'DEAD', stage = '', step = 0, steps = 0, epoch = 0, keep_ms = keep_ms }, e)
    end
  end
  return { 'refused', e.code, e.message }
end

-- What the queue has of work, and one tenant of it, GPU-milliseconds; read once, then kept up.
local function read_loads(tenant)
  run.loads = { mine = read_tenant(tenant), all = 0, limit = conf('max_backlog_ms') }
  if run.loads.limit == 0 then return end
  local counted = call('HGETALL', P .. 'stats')
  for i = 1, #counted, 2 do
    if counted[i]:find('_ms:', 1, true) then run.loads.all = run.loads.all + max(0, counted[i + 1]) end
  end
end

-- The reason why there is no room for a job; nil: there is. When there will be is a guess: as if each job in work did one
-- GPU-second in a second.
local function above(who, has, limit, gpu_ms)
  if limit <= 0 or has + gpu_ms <= limit then return end
  local text = format('%s has %.3f GPU-seconds of work waiting and running, its limit is %.3f, and this job would add %.3f; ',
    who, has / 1000, limit / 1000, gpu_ms / 1000)
  local working = call('ZCARD', P .. 'lease')
  if gpu_ms > limit then text = text .. 'ask for less: it is above the limit by itself'
  elseif working == 0 then text = text .. 'submit it again when some of that is done'
  else text = text .. format('submit it again in about %d s', math.ceil((has + gpu_ms - limit) / 1000 / working)) end
  return { code = 'overloaded', message = text, retryable = true }
end
local function no_room(tenant, gpu_ms)
  local loads = run.loads
  return above('tenant ' .. tenant, loads.mine.gpu_ms, loads.mine.max_queued_ms, gpu_ms)
    or above('the queue', loads.all, loads.limit, gpu_ms)
end

-- The reason why a job cannot meet its deadline with the whole fleet to itself; nil: it can. Of the queue before it this says
-- nothing.
local function no_time(r)
  local start, speed = max(now(), r.due_ms), conf('max_speed')
  if r.deadline_ms <= now() or speed <= 0 or start + r.gpu_ms / speed <= r.deadline_ms then return end
  return { code = 'expired', message = string.format('deadline_ms leaves %.3f s from the earliest start, and a job of %.3f '
    .. 'GPU-seconds takes at least %.3f s (max_speed is %g); give it longer or ask for less',
    (r.deadline_ms - start) / 1000, r.gpu_ms / 1000, r.gpu_ms / speed / 1000, speed) }
end

-- The same id again: the same job, or one that is refused.
local function admit_again(tenant, a, there, there_hash, hash)
  if there_hash ~= hash then
    return refuse(tenant, a, { code = 'conflict',
      message = 'id is taken by a job with other bytes, which is untouched; choose another id' })
  end
  local receipt = record_key(tenant, '@' .. a.entry)
  call('HSET', receipt, 'same_as', a.id)
  call('PEXPIRE', receipt, int(conf('retention_ms')))
  tell({ tenant = tenant, id = '@' .. a.entry, state = there.state, stage = '', step = 0, steps = 0, epoch = there.epoch })
  call('PEXPIRE', P .. 'ev:' .. tenant .. ':@' .. a.entry, int(conf('retention_ms')))
  return 'duplicate'
end

local function admit_one(tenant, a)
  -- An entry that is not pending was admitted by another, or its delivery is lost.
  if call('XACK', P .. 'in:' .. tenant, 'admit', a.entry) == 0 then return 'gone' end
  if a.code ~= '' then
    return refuse(tenant, a, { code = a.code, message = a.message })
  end
  local hash, k = redis.sha1hex(a.payload), record_key(tenant, a.id)
  if call('EXISTS', k) == 1 then
    local there, v = load(tenant, a.id, 'hash', 'refused')
    if v[MORE + 1] ~= '1' then return admit_again(tenant, a, there, v[MORE], hash) end
    call('DEL', k, P .. 'ev:' .. tenant .. ':' .. a.id)
  end
  local r = { tenant = tenant, id = a.id, state = '', pool = a.pool, class = a.class, gpu_ms = tonumber(a.gpu_ms),
              deadline_ms = tonumber(a.deadline_ms), due_ms = tonumber(a.not_before_ms), callback = a.callback,
              rank = next_rank(), epoch = 0, stage = '', step = 0, steps = 0 }
  local why_not = no_time(r) or no_room(tenant, r.gpu_ms)
  if why_not then return refuse(tenant, a, why_not) end
  local set = { 'payload', a.payload, 'hash', hash, 'entry', a.entry, 'pool', a.pool, 'class', a.class, 'gpu_ms', a.gpu_ms,
    'batch', a.batch, 'rank', r.rank, 'created_ms', now_text() }
  -- A field of a record takes 70 bytes: what says nothing is left out.
  for name, value in pairs({ deadline_ms = a.deadline_ms, due_ms = a.not_before_ms, max_attempts = a.max_attempts,
                             callback = a.callback }) do
    if value ~= '0' and value ~= '' then set[#set + 1], set[#set + 2] = name, value end
  end
  begin(r)
  if r.deadline_ms > 0 and r.deadline_ms <= now() then
    expire(r, set)
    return 'admitted'
  end
  run.loads.all = run.loads.all + r.gpu_ms
  move(r, r.due_ms > now() and 'DELAYED' or 'QUEUED', set)
  return 'admitted'
end

-- admit <tenant>, then for each entry: entry, id, payload, size, pool, class, gpu_ms, deadline_ms, not_before_ms, max_attempts,
-- batch, callback, code, message; code not empty: refuse it with code and message
function ops.admit()
  local out, done = {}, {}
  read_loads(argv[2])
  for at = 3, #argv, 14 do
    local entry, id, payload, size, pool, class, gpu_ms, deadline_ms, not_before_ms, max_attempts, batch, callback, code, message =
      unpack(argv, at, at + 13)
    out[#out + 1] = admit_one(argv[2], {
      entry = entry, id = id, payload = payload, size = size, pool = pool, class = class, gpu_ms = gpu_ms,
      deadline_ms = deadline_ms, not_before_ms = not_before_ms, max_attempts = max_attempts, batch = batch,
      callback = callback, code = code, message = message,
    })
    -- What is gone may be in the door all the same: a failover can lose its delivery. It will be delivered again.
    if out[#out] ~= 'gone' then done[#done + 1] = entry end
  end
  if #done > 0 then call('XDEL', P .. 'in:' .. argv[2], unpack(done)) end
  return out
end

end
local function holders()

-- The tenant to serve next in a class: its purse, with the pool; or nil.
local function choose(pools, class)
  local best
  for _, pool in ipairs(pools) do
    local ring = ring_key(pool, class)
    for _ = 1, K do
      local head = call('ZRANGE', ring, '0', '0', 'WITHSCORES')
      if #head == 0 then break end
      local p = read_purse(head[1])
      if p.again then
        call('ZREM', ring, p.tenant)
        call('ZADD', P .. 'limited', int(p.again), pool .. ':' .. class .. ':' .. p.tenant)
      elseif p.vtime > tonumber(head[2]) then call('ZADD', ring, real(p.vtime), p.tenant) -- the score lagged: look again
      else
        p.pool = pool
        if not best or p.vtime < best.vtime then best = p end
        break
      end
    end
  end
  return best
end

-- What else a claim reads, in one call with the rest, and answers: as text, as it is.
local CLAIMED = { 'batch', 'attempts_app', 'attempts_infra', 'created_ms', 'payload' }
local function claimed(r, v, epoch, lease_ms)
  return { r.tenant, r.id, epoch, r.nonce, r.pool, v[MORE + 1] or '0', v[MORE + 2] or '0', v[MORE + 3] or '0', lease_ms,
           int(r.deadline_ms), v[MORE + 4] or '' }
end

local function lease(r, v, c, nonce)
  local epoch = int(r.epoch + 1)
  r.epoch, r.nonce, r.worker, r.lease_ms = r.epoch + 1, nonce, c.worker, c.lease_ms
  r.holder = c.incarnation .. ' ' .. epoch .. ' ' .. nonce
  move(r, 'LEASED', { 'epoch', epoch, 'nonce', nonce, 'worker', c.worker, 'left', '', 'lease_ms', c.lease_ms })
  return claimed(r, v, epoch, c.lease_ms)
end

-- Higher classes come first, but for turns: while a class waits, each GPU-second that goes to a higher one in its pool brings its
-- turn nearer, and each of its own by a turn puts the next one off by turn_<class>. turns holds, for <pool>:<class>, what is
-- missing, below nothing; from 0 on it is its turn. What does not wait saves up nothing.
local TURNED = { 'normal', 'low' }
local function read_turns(pools)
  local names, turns = {}, {}
  for _, pool in ipairs(pools) do
    for _, class in ipairs(TURNED) do names[#names + 1] = pool .. ':' .. class end
  end
  local values = #names > 0 and call('HMGET', P .. 'turns', unpack(names))
  for i, name in ipairs(names) do turns[name] = values[i] and tonumber(values[i]) end
  return turns
end
local function pass_turns(turns, pool, class, gpu_ms)
  local name, lower = pool .. ':' .. class, false
  if (turns[name] or -1) >= 0 then call('HSET', P .. 'turns', name, turns[name] - conf('turn_' .. class) * gpu_ms) end
  for _, other in ipairs(CLASSES) do
    name = pool .. ':' .. other
    if lower and call('EXISTS', ring_key(pool, other)) == 1 then
      -- The first time as if it had just had a turn.
      call('HSET', P .. 'turns', name, (turns[name] or -conf('turn_' .. other) * gpu_ms) + gpu_ms)
    end
    lower = lower or other == class
  end
end

-- The tenant pays in advance, and the clock moves on to where it stood.
local function charge(best, gpu_ms)
  local weight, t = tonumber(call('HGET', P .. 'tenants', best.tenant) or 1), read_tenant(best.tenant)
  t.vtime, t.spent_ms, t.spent_at, t.changed = best.vtime + gpu_ms / weight, best.spent + gpu_ms, now(), true
  if best.vtime > vclock() then call('SET', P .. 'vclock', real(best.vtime)) end
end

-- Claims from one tenant: its oldest job, and up to c.most of the same batch key. Members that are no claimable job
-- leave the set, so the caller's loop makes progress.
local function claim_from(c, best, class, out)
  local ready, batch, gpu_ms = P .. 'ready:' .. best.pool .. ':' .. class .. ':' .. best.tenant, nil, 0
  local members = call('ZRANGE', ready, '0', c.most > 1 and int(K - 1) or '0')
  if #members == 0 then call('ZREM', ring_key(best.pool, class), best.tenant) end
  for _, m in ipairs(members) do
    if #out == c.most then break end
    local r, v = load_member(m, unpack(CLAIMED))
    if not r or r.state ~= 'QUEUED' then
      call('ZREM', ready, m)
      call('HDEL', P .. 'due', m)
      add_tenant(best.tenant, 'ready', -1)
    elseif r.deadline_ms > 0 and r.deadline_ms <= now() then expire(r)
    elseif not batch or v[MORE] == batch then
      batch, gpu_ms = v[MORE], gpu_ms + r.gpu_ms
      out[#out + 1] = lease(r, v, c, c.nonces[#out + 1])
    end
  end
  if #out > 0 then
    charge(best, gpu_ms)
    pass_turns(c.turns, best.pool, class, gpu_ms)
  end
end

-- Unless there is something already.
local function claim_class(c, pools, class, out)
  for _ = 1, K do
    local best = #out == 0 and choose(pools, class)
    if not best then return end
    claim_from(c, best, class, out)
  end
end

-- The same claim sent again after a lost reply gets what it got.
local function claimed_before(c, out)
  local held = call('HGETALL', P .. 'held:' .. c.worker)
  for i = 1, #held, 2 do
    local nonce = held[i + 1]:match('%S+$')
    for n = 1, c.most do
      if c.nonces[n] == nonce then
        local r, v = load_member(held[i], unpack(CLAIMED))
        if r then out[#out + 1] = claimed(r, v, int(r.epoch), call('ZSCORE', P .. 'lease', held[i]) or now_text()) end
      end
    end
  end
end

-- claim <worker> <incarnation> <lease_ms> <n> <nonce>*n <pool>...; {cursor of wake, job, ...}
function ops.claim()
  local c = { worker = argv[2], incarnation = argv[3], lease_ms = int(now() + tonumber(argv[4])),
    most = min(K, tonumber(argv[5])), nonces = {} }
  local out, pools = {}, {}
  for i = 1, c.most do c.nonces[i] = argv[5 + i] end
  for i = 6 + c.most, #argv do pools[#pools + 1] = argv[i] end
  claimed_before(c, out)
  c.turns = read_turns(pools)
  for _, pool in ipairs(pools) do
    for _, class in ipairs(TURNED) do
      if (c.turns[pool .. ':' .. class] or -1) >= 0 then claim_class(c, { pool }, class, out) end
    end
  end
  for _, class in ipairs(CLASSES) do claim_class(c, pools, class, out) end
  -- Who has got something need not wait: from the beginning on there is always something.
  local last = #out == 0 and call('XREVRANGE', P .. 'wake', '+', '-', 'COUNT', '1')[1]
  table.insert(out, 1, last and last[1] or '0-0')
  return out
end

-- The record, if the fence in argv[2..5] (tenant, id, epoch, nonce) holds it; else nil and why: its state when the fence
-- was the last one, with how it was left; 'STALE' when it is somebody else's by now.
local function fenced()
  local r = load(argv[2], argv[3])
  if not r or r.epoch ~= tonumber(argv[4]) or r.nonce ~= argv[5] then return nil, 'STALE' end
  if HELD[r.state] then return r end
  return nil, r.state, call('HGET', record_key(r.tenant, r.id), 'left')
end

-- beat <fence> <lease_ms or 0> [<state> <stage> <step> <steps> <eta>]
function ops.beat()
  local r, why = fenced()
  if not r then return why end
  local k, extend = record_key(r.tenant, r.id), tonumber(argv[6])
  if extend > 0 then
    call('ZADD', P .. 'lease', 'GT', int(now() + extend), member(r))
    call('HSET', k, 'lease_ms', int(now() + extend))
  end
  if not argv[7] then return 'ok' end
  r.stage, r.step, r.steps = argv[8], tonumber(argv[9]), tonumber(argv[10])
  local set = { 'stage', r.stage, 'step', int(r.step), 'steps', int(r.steps) }
  if r.state ~= argv[7] then move(r, argv[7], set, nil, tonumber(argv[11]))
  else
    call('HSET', k, 'updated_ms', now_text(), unpack(set))
    tell(r, nil, tonumber(argv[11]))
  end
  return 'ok'
end

-- finish <fence> <result>
function ops.finish()
  local r, why = fenced()
  if not r then return why == 'SUCCEEDED' and 'ok' or why end
  move(r, 'SUCCEEDED', { 'result', argv[6], 'error_code', '', 'error', '' })
  return 'ok'
end

-- fail <fence> <app|infra> <code> <message> <retryable 0|1> <random>; {'ok', state}
function ops.fail()
  local r, why, left = fenced()
  if not r then return left == 'fail' and { 'ok', why } or { why } end
  fail_attempt(r, argv[6], { code = argv[7], message = argv[8], retryable = argv[9] == '1' }, tonumber(argv[10]), 'fail')
  return { 'ok', r.state }
end

-- release <fence>: no attempt charged
function ops.release()
  local r, why, left = fenced()
  if not r then return left == 'release' and 'ok' or why end
  r.stage, r.step = '', 0
  move(r, 'QUEUED', { 'left', 'release', 'stage', '', 'step', 0 })
  return 'ok'
end

-- Whether another worker than this one serves the pool.
local function another_serves(pool, worker)
  for _, name in ipairs(call('ZRANGEBYSCORE', P .. 'serves:' .. pool, now() - SERVES_MS, '+inf', 'LIMIT', 0, 2)) do
    if name ~= worker then return true end
  end
  return false
end

-- A worker crashed over the job, which speaks against it: the second time, at another worker where there is another, it is
-- poison, and this is the error that says so; else nil.
local function poison(r, worker, e)
  local k = record_key(r.tenant, r.id)
  local first = call('HGET', k, 'died_at')
  if not first then call('HSET', k, 'died_at', worker) end
  if not first or (first == worker and another_serves(r.pool, worker)) then return end
  return { code = e.code, retryable = false, message = string.format('poison: workers crashed over this job twice, on %s and on %s; '
    .. 'the last: %s', first, worker, e.message) }
end

-- release_all <worker> <incarnation or ''> <code> <message> <random>; {returned, 1 if there are more}. Code crashed: the worker's
-- process did, over what it computed. What it only uploaded is to blame when there is nothing else.
function ops.release_all()
  local k, n = P .. 'held:' .. argv[2], 0
  local held, mine, computed = call('HGETALL', k), {}, false
  for i = 1, #held, 2 do
    local incarnation, epoch = held[i + 1]:match('^(%S*) (%d+)')
    if incarnation == argv[3] or argv[3] == '' then
      if n == K then break end
      n = n + 1
      local r = load_member(held[i])
      if r and HELD[r.state] and r.worker == argv[2] and int(r.epoch) == epoch then
        mine[#mine + 1], computed = r, computed or r.state ~= 'UPLOADING'
      else call('HDEL', k, held[i]) end
    end
  end
  for i, r in ipairs(mine) do
    local e = { code = argv[4], message = argv[5], retryable = true }
    local bad = e.code == 'crashed' and (r.state ~= 'UPLOADING' or not computed) and poison(r, argv[2], e)
    fail_attempt(r, 'infra', bad or e, (tonumber(argv[6]) + i * 0.618) % 1, 'lost', bad)
  end
  return { n, n == K and 1 or 0 }
end

-- cancel <tenant> <id>: the state after it, or false
function ops.cancel()
  local r = load(argv[2], argv[3])
  if not r then return false end
  if not FINAL[r.state] then fail_final(r, 'CANCELLED', { code = 'cancelled', message = 'cancelled on request' }) end
  return r.state
end

end
local function upkeep()

local function reap_lease(m, random)
  local r = load_member(m)
  if not r or not HELD[r.state] then call('ZREM', P .. 'lease', m) return 'stray' end
  if r.deadline_ms > 0 and r.deadline_ms <= now() then expire(r) return 'expired' end
  fail_attempt(r, 'infra', { code = 'timeout', message = 'the lease ran out: worker ' .. r.worker .. ' was not heard from',
    retryable = true }, random, 'lost')
  return 'lost'
end

local function reap_delayed(m)
  local r = load_member(m)
  if not r or not WAITING[r.state] then call('ZREM', P .. 'delayed', m) return 'stray' end
  if r.deadline_ms > 0 and r.deadline_ms <= now() then expire(r) return 'expired' end
  move(r, 'QUEUED', {})
  return 'due'
end

-- Is the record in the index of its state? If not, puts it there.
local function mend(r, random)
  local m = member(r)
  if r.state == 'QUEUED' then
    local ring = ring_key(r.pool, r.class)
    if call('ZSCORE', ready_key(r), m) and (call('ZSCORE', ring, r.tenant)
      or call('ZSCORE', P .. 'limited', r.pool .. ':' .. r.class .. ':' .. r.tenant)) then return false end
    local t = read_tenant(r.tenant)
    call('ZADD', ring, real(t.vtime), r.tenant)
    if call('ZADD', ready_key(r), r.rank, m) == 1 and t.ready < 1 then t.ready, t.changed = 1, true end
    wake(r.pool)
  elseif WAITING[r.state] then
    if call('ZADD', P .. 'delayed', 'NX', int(r.due_ms), m) == 0 then return false end
  else
    if call('ZSCORE', P .. 'lease', m) then return false end
    fail_attempt(r, 'infra', { code = 'timeout', message = 'the job had no lease', retryable = true }, random, 'lost')
  end
  return true
end

local function reap_live(m, random)
  local r = load_member(m)
  if not r or FINAL[r.state] then
    for _, index in ipairs({ 'live', 'lease', 'delayed' }) do call('ZREM', P .. index, m) end
    return 'stray'
  end
  if r.deadline_ms > 0 and r.deadline_ms <= now() then expire(r) return 'expired' end
  local orphan = mend(r, random)
  if not FINAL[r.state] then call('ZADD', P .. 'live', int(next_check(r)), m) end
  return orphan and 'orphans' or 'stray'
end

local function reap_limited(m)
  end_limit(m:match('^([^:]*):([^:]*):(.*)$'))
  return 'stray'
end

-- reap <random>; {lost, due, expired, orphans, milliseconds until the next}
function ops.reap()
  local n = { lost = 0, due = 0, expired = 0, orphans = 0, stray = 0 }
  local random, i = tonumber(argv[2]), 0
  for _, step in ipairs({ { 'lease', reap_lease }, { 'delayed', reap_delayed }, { 'live', reap_live },
    { 'limited', reap_limited } }) do
    for _, m in ipairs(due(step[1])) do
      i = i + 1
      local what = step[2](m, (random + i * 0.618) % 1)
      n[what] = n[what] + 1
    end
  end
  local wait = 1000
  for _, index in ipairs({ 'lease', 'delayed', 'live', 'limited' }) do
    local first = call('ZRANGE', P .. index, '0', '0', 'WITHSCORES')
    if first[2] then wait = max(0, min(wait, tonumber(first[2]) - now())) end
  end
  return { n.lost, n.due, n.expired, n.orphans, wait }
end

end
local function callbacks()

local function drop_callback(tenant, id, entry)
  call('XDEL', P .. 'outbox', entry)
  call('ZREM', due_key(tenant), entry)
  if call('EXISTS', due_key(tenant)) == 0 then call('ZREM', P .. 'outbox_ring', tenant) end
  call('HDEL', P .. 'outbox_tries', entry)
  call('HDEL', P .. 'outbox_hold', entry)
  -- From now on the record stays as long as any. One that never expires is of a job that is not final.
  local key = id and record_key(tenant, id)
  if key and call('PTTL', key) > 0 then call('PEXPIRE', key, int(conf('retention_ms')), 'LT') end
end

-- The callback of an entry of outbox; nil: it can be told no more, and is given up.
local function read_callback(tenant, entry)
  local found, c = call('XRANGE', P .. 'outbox', entry, entry), {}
  if not found[1] then return drop_callback(tenant, nil, entry) end
  local fields = found[1][2]
  for i = 1, #fields, 2 do c[fields[i]] = fields[i + 1] end
  c.key = record_key(c.tenant, c.id)
  local record = call('HMGET', c.key, 'entry', 'updated_ms', 'result', 'life')
  if record[1] ~= c.entry then
    give_up_callback(c, 'not_found', 'the callback was not made: the record is gone (retention_ms)', c.url:match('^[^?#]*'))
    return drop_callback(tenant, nil, entry)
  end
  c.life = c.life or ''
  if (record[4] or '') ~= c.life then return drop_callback(tenant, nil, entry) end -- it lives again: there is nothing to tell yet
  c.updated_ms, c.result = record[2], record[3] or ''
  -- The same for each try, and also where a failover let a job be finished twice; another in another life.
  c.message = 'msg_' .. redis.sha1hex(P .. c.tenant .. ':' .. c.id .. ' ' .. c.entry .. ' ' .. c.state .. c.life)
  return c
end

-- The callback of an entry that falls to the caller now; nil as above.
local function take_callback(tenant, entry, lease_ms)
  local c = read_callback(tenant, entry)
  if not c then return end
  call('ZADD', due_key(tenant), int(now() + lease_ms), entry)
  keep_record(c.key, lease_ms)
  return { entry, int(call('HINCRBY', P .. 'outbox_hold', entry, 1)), int(call('HINCRBY', P .. 'outbox_tries', entry, 1)),
           c.message, c.tenant, c.id, c.state, c.url, c.updated_ms, c.result }
end

-- A tenant that had its turn goes behind all that wait for theirs; to when its next is due; or out.
local function turn_ring(tenant)
  local first = call('ZRANGE', due_key(tenant), 0, 0, 'WITHSCORES')
  if first[1] then call('ZADD', P .. 'outbox_ring', int(max(now(), tonumber(first[2]))), tenant)
  else call('ZREM', P .. 'outbox_ring', tenant) end
end

-- The place in tenants of the first that has the fewest in hand; nil: none may have more.
local function next_turn(tenants, hand, most)
  local best
  for i, tenant in ipairs(tenants) do
    if hand[tenant] < (best and hand[tenants[best]] or most) then best = i end
  end
  return best
end

-- callbacks <n> <lease_ms> <most of a tenant> {<tenant> <in hand>}: up to n callbacks to make now; {milliseconds until the
-- next, {entry, hold, try, message, tenant, id, state, url, updated_ms, result}, ...}. The tenant with the fewest in hand comes
-- first, whoever has waited longer, so that slow receivers do not stand before everybody else's.
function ops.callbacks()
  local n, lease_ms, most, hand, out = min(K, tonumber(argv[2])), tonumber(argv[3]), tonumber(argv[4]), {}, { 0 }
  for i = 5, #argv, 2 do hand[argv[i]] = tonumber(argv[i + 1]) end
  local tenants, full = due('outbox_ring'), false
  for _, tenant in ipairs(tenants) do hand[tenant] = hand[tenant] or 0 end
  for _ = 1, K do
    local i = #out <= n and next_turn(tenants, hand, most)
    if not i then break end
    local tenant = tenants[i]
    local entry = due('outbox_due:' .. tenant, 1)[1]
    local taken = entry and take_callback(tenant, entry, lease_ms)
    if taken then out[#out + 1], hand[tenant] = taken, hand[tenant] + 1 end
    if not entry then table.remove(tenants, i) end
    turn_ring(tenant)
  end
  for _, tenant in ipairs(tenants) do full = full or hand[tenant] >= most end
  local first = call('ZRANGE', P .. 'outbox_ring', 0, 0, 'WITHSCORES')
  out[1] = first[2] and max(full and 250 or 0, min(1000, tonumber(first[2]) - now())) or 1000
  return out
end

-- The tenant and id of the callback <entry> <hold> of argv, if it still is in that hand.
local function held_callback()
  if call('HGET', P .. 'outbox_hold', argv[2]) ~= argv[3] then return end
  local found = call('XRANGE', P .. 'outbox', argv[2], argv[2])
  local fields = found[1] and found[1][2]
  return fields and { tenant = fields[2], id = fields[4] }
end

-- callback_done <entry> <hold>
function ops.callback_done()
  local c = held_callback()
  if not c then return 'STALE' end
  drop_callback(c.tenant, c.id, argv[2])
  return 'ok'
end

-- callback_retry <entry> <hold> <wait_ms> <1, or 0: it does not count as a try>
function ops.callback_retry()
  local c, wait_ms = held_callback(), tonumber(argv[4])
  if not c then return 'STALE' end
  keep_record(record_key(c.tenant, c.id), wait_ms)
  put_callback(c.tenant, argv[2], now() + wait_ms)
  call('HINCRBY', P .. 'outbox_hold', argv[2], 1) -- it is in no hand: the same message once more changes nothing
  if argv[5] == '0' then call('HINCRBY', P .. 'outbox_tries', argv[2], -1) end
  return 'ok'
end

-- callback_dead <entry> <hold> <code> <message> <url to show>
function ops.callback_dead()
  local c = held_callback()
  if not c then return 'STALE' end
  give_up_callback(c, argv[4], argv[5], argv[6])
  drop_callback(c.tenant, c.id, argv[2])
  return 'ok'
end

end
local function dead_letters()

local function letter(fields)
  local l = {}
  for i = 1, #fields, 2 do l[fields[i]] = fields[i + 1] end
  l.kind = l.callback and 'callback' or l.entry and 'refused' or 'job'
  return l
end
local function find_letter()
  local found = call('XRANGE', P .. 'dlq', argv[2], argv[2])
  return found[1] and letter(found[1][2])
end

-- dead <letter or ''>: the dead letters after it; {letter, kind, tenant, id, code, error, entry, callback}, ...
function ops.dead()
  local out = {}
  for i, found in ipairs(call('XRANGE', P .. 'dlq', argv[2] == '' and '-' or '(' .. argv[2], '+', 'COUNT', K)) do
    local l = letter(found[2])
    out[i] = { found[1], l.kind, l.tenant, l.id, l.code, l.error, l.entry or '', l.callback or '' }
  end
  return out
end

-- What is to be done with a letter of each kind; {word, new entry}, or {'', code, message}.
local retry = {}

-- A DEAD job lives again under its id: with all its attempts, behind those that wait, and under another life, so that whoever
-- is to be called back is told of its new end. The epoch goes on: no fence is ever used twice.
function retry.job(l)
  local r, k = load(l.tenant, l.id), record_key(l.tenant, l.id)
  if not r or r.state ~= 'DEAD' or call('HSTRLEN', k, 'payload') == 0 then
    return { '', 'not_found', 'the job is there no more, or lives again' }
  end
  if r.deadline_ms > 0 and r.deadline_ms <= now() then return { '', 'expired', 'the deadline of the job has passed' } end
  r.rank, r.stage, r.step, r.steps, r.due_ms = next_rank(), '', 0, 0, 0
  call('PERSIST', k)
  call('PERSIST', P .. 'ev:' .. member(r))
  call('HDEL', k, 'result', 'due_ms', 'died_at')
  call('HINCRBY', k, 'life', 1)
  begin(r)
  move(r, 'QUEUED', { 'attempts_app', 0, 'attempts_infra', 0, 'left', '', 'stage', '', 'step', 0, 'steps', 0,
    'error_code', '', 'error', '', 'rank', r.rank, 'created_ms', now_text() })
  return { 'queued', '' }
end

-- The bytes go to the door once more: admission may think otherwise by now.
function retry.refused(l)
  if #l.payload ~= tonumber(l.size) then return { '', 'corrupt', 'only the beginning of the submission was kept' } end
  return { 'submitted', call('XADD', P .. 'in:' .. l.tenant, '*', 'job', l.payload) }
end

function retry.callback(l)
  local r = load(l.tenant, l.id)
  if not r or not FINAL[r.state] or r.callback == '' then return { '', 'not_found', 'the job is there no more, or lives again' } end
  post_callback(r, record_key(l.tenant, l.id))
  return { 'callback', '' }
end

-- dead_retry <letter>: nil where there is none
function ops.dead_retry()
  local l = find_letter()
  if not l then return false end
  local done = retry[l.kind](l)
  if done[1] ~= '' then call('XDEL', P .. 'dlq', argv[2]) end
  return done
end

-- dead_drop <letter>: nil where there is none. A DEAD job's record stays, but for its payload.
function ops.dead_drop()
  local l = find_letter()
  if not l then return false end
  local r = l.kind == 'job' and load(l.tenant, l.id)
  if r and r.state == 'DEAD' then call('HSET', record_key(l.tenant, l.id), 'payload', '') end
  call('XDEL', P .. 'dlq', argv[2])
  return 'ok'
end

end
local function figures()

-- stats: {field, value, ...}: jobs now in each state, totals of the final ones, what waits in the doors and in dlq, and the
-- backlog in GPU-milliseconds. The sizes of the indexes say most; the rest is counted in move().
function ops.stats()
  local n, out = { QUEUED = 0, waiting = 0, gpu_ms = 0 }, {}
  local counted = call('HGETALL', P .. 'stats')
  for i = 1, #counted, 2 do
    if counted[i]:find('_ms:', 1, true) then n.gpu_ms = n.gpu_ms + counted[i + 1]
    elseif not counted[i]:find(':', 1, true) then n[counted[i]] = tonumber(counted[i + 1]) end -- a pool's: see ops.pools
  end
  for _, tenant in ipairs(call('HKEYS', P .. 'tenants')) do
    n.waiting = n.waiting + call('XLEN', P .. 'in:' .. tenant)
    n.QUEUED = n.QUEUED + (call('HGET', P .. 'tenant:' .. tenant, 'ready') or 0)
  end
  n.dead_letter = call('XLEN', P .. 'dlq')
  n.LEASED = call('ZCARD', P .. 'lease') - (n.RUNNING or 0) - (n.UPLOADING or 0)
  n.DELAYED = call('ZCARD', P .. 'delayed') - (n.RETRY_WAIT or 0)
  for field, value in pairs(n) do out[#out + 1], out[#out + 2] = field, int(value) end
  return out
end

-- Since when a pool's oldest QUEUED job could be claimed, milliseconds; nil: there is none. A ready set is in order of
-- admission, so that only its first is looked at; and of each class only the first K tenants.
local function oldest(pool)
  local since
  for _, class in ipairs(CLASSES) do
    for _, tenant in ipairs(call('ZRANGE', ring_key(pool, class), 0, K - 1)) do
      local first = call('ZRANGE', P .. 'ready:' .. pool .. ':' .. class .. ':' .. tenant, 0, 0, 'WITHSCORES')
      if first[1] then
        local due_ms = tonumber(call('HGET', P .. 'due', first[1]) or 0)
        since = min(since or now(), max(first[2] / 1000, due_ms))
      end
    end
  end
  return since
end

-- pools: {pool, queued, delayed, working, queued_ms, delayed_ms, working_ms, oldest_ms, ...}: jobs, their GPU-milliseconds,
-- and how long the oldest QUEUED one has been claimable. Pools that are published or have jobs; no record is read
-- and nothing written: like stats it runs by EVALSHA_RO.
function ops.pools()
  local pools, names, out = {}, {}, {}
  local function seen(pool)
    if not pools[pool] then pools[pool], names[#names + 1] = {}, pool end
    return pools[pool]
  end
  for _, name in ipairs(call('HKEYS', P .. 'models')) do
    if name:find('@', 1, true) then seen(name) end
  end
  local counted = call('HGETALL', P .. 'stats')
  for i = 1, #counted, 2 do
    local field, pool = counted[i]:match('^([^:]*):(.*)$')
    if field and counted[i + 1] ~= '0' then seen(pool)[field] = tonumber(counted[i + 1]) end
  end
  table.sort(names)
  for _, pool in ipairs(names) do
    out[#out + 1] = pool
    for _, field in ipairs({ 'queued', 'delayed', 'working', 'queued_ms', 'delayed_ms', 'working_ms' }) do
      out[#out + 1] = int(max(0, pools[pool][field] or 0))
    end
    local since = oldest(pool)
    out[#out + 1] = int(since and max(0, now() - since) or 0)
  end
  return out
end

end

local groups, made = { holders, admission, upkeep, callbacks, figures, registry, dead_letters }, 0
return function(keys, arguments)
  P, argv = keys[1], arguments
  -- woken: pools; ringed: ready sets whose tenant is in its ring; counts, pools, tenants: see write_figures.
  run = { now = false, now_text = '', micros = 0, ticks = false, conf = false, loads = false,
          woken = {}, ringed = {}, counts = {}, pools = {}, tenants = {} }
  call, char, format, tonumber = redis.call, string.char, string.format, _G.tonumber
  floor, min, max = math.floor, math.min, math.max
  while not ops[argv[1]] and made < #groups do
    made = made + 1
    groups[made]()
  end
  if not ops[argv[1]] then return redis.error_reply('ERR queue.lua has no operation of this name') end
  local answer = ops[argv[1]]()
  write_figures()
  return answer
end

end
-- Without memory Redis refuses submissions; what is in the queue goes on, which is how memory comes back.
if redis.register_function then
  return redis.register_function({ function_name = FUNCTION_NAME, callback = queue(), flags = { 'allow-oom' } })
end
return queue()(KEYS, ARGV)
