-- gather.lua: how a worker group of several nodes comes together. Each node's supervisor says a few times a second where
-- it stands and hears where the others do. Redis runs scripts one at a time: the one whose offer completes the set forms
-- the group, and everybody who offers with it hears the same of it, once or again.
--
-- KEYS[1]  the group's hash; of each node NODE.phase .mark .terms .places .reason .seen .offered
-- ARGV     this node's number, phase, mark, terms, places, reason; then all nodes in the order of ranks
--
--   offer  ready to start its ranks at `places`, under `terms`; mark: of this offer, drawn at random
--   run    has the ranks of formation `mark`, or starts them;   drain  the same, but they are told to finish
--   away   has none; reason: why
--
-- Terms and places are an offer's, and stay. Replies {formation or "", its secret, {phase, mark, milliseconds since it
-- was seen (-1: never), terms, places, reason} of each node}. An offer that was taken stays so until one of the others
-- is no longer in the formation.

local key, n, me = KEYS[1], #ARGV - 6, tonumber(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local FRESH_MS, KEEP_MS = 2000, 86400000

local nodes = {}
for i = 1, n do
  local name = ARGV[6 + i]
  local f = redis.call('HMGET', key, name .. '.phase', name .. '.mark', name .. '.terms', name .. '.places',
                       name .. '.reason', name .. '.seen', name .. '.offered')
  nodes[i] = {name = name, phase = f[1] or 'away', mark = f[2] or '', terms = f[3] or '', places = f[4] or '',
              reason = f[5] or '', seen = tonumber(f[6] or '0'), offered = f[7] or ''}
end

local function write(node)
  local name = node.name
  redis.call('HSET', key, name .. '.phase', node.phase, name .. '.mark', node.mark, name .. '.terms', node.terms,
             name .. '.places', node.places, name .. '.reason', node.reason, name .. '.seen', now,
             name .. '.offered', node.offered)
end

-- Whether all have the ranks of formation `mark`, as far as they said.
local function stands(mark)
  for i = 1, n do
    if nodes[i].mark ~= mark or (nodes[i].phase ~= 'run' and nodes[i].phase ~= 'drain') then return false end
  end
  return true
end

local function complete()
  for i = 1, n do
    if nodes[i].phase ~= 'offer' or now - nodes[i].seen > FRESH_MS or nodes[i].terms ~= nodes[me].terms then
      return false
    end
  end
  return true
end

-- Of the marks, which nobody knows who may not read this hash: one half names the formation, the other proves who is in it.
local function names_of(marks)
  local sum = redis.sha1hex(marks)
  return sum:sub(1, 16), sum:sub(17, 40)
end

local function marks_offered()
  local marks = ''
  for i = 1, n do marks = marks .. nodes[i].offered .. ' ' end
  return marks
end

local mine = nodes[me]
local phase, mark = ARGV[2], ARGV[3]
local taken = phase == 'offer' and mine.offered == mark and stands(mine.mark)
mine.seen = now
if not taken then
  mine.phase, mine.mark, mine.reason = phase, mark, ARGV[6]
  if phase == 'offer' then mine.terms, mine.places, mine.offered = ARGV[4], ARGV[5], '' end
end
if phase == 'offer' and not taken and complete() then
  for i = 1, n do nodes[i].offered = nodes[i].mark end
  local formation = names_of(marks_offered())
  for i = 1, n do
    nodes[i].phase, nodes[i].mark = 'run', formation
    write(nodes[i])
  end
  taken = true
else
  write(mine)
end
redis.call('PEXPIRE', key, KEEP_MS)

local formation, secret = '', ''
if taken then formation, secret = names_of(marks_offered()) end
local reply = {formation, secret}
for i = 1, n do
  local node = nodes[i]
  reply[2 + i] = {node.phase, node.mark, node.seen > 0 and now - node.seen or -1, node.terms, node.places, node.reason}
end
return reply
