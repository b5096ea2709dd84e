-- Counts one request in its meters and its budget, all or none: server.limits.redis asks, and the arithmetic is
-- that of server.limits.rate.RateMeter and server.limits.budget.Spending.
-- KEYS: of each meter its requests and tokens (hashes by grain of time), its leases (by end), what is reserved
--   (by request); of places, whose requests are not counted, in the place of these who waits, by request: since
--   when, until when it is to be heard of again, for how many (server.limits.line.Line); of the budget, if there is one, leases, reserved tokens, reserved cost (by request), day, month.
-- ARGV: refresh|reserve|change|renew|close; now (0: Redis's clock), window and grain in seconds; lease in seconds,
--   id of the request, its reserved and used tokens, reserved and used cost; number of meters; seconds that it has waited for
--   places (-1: it does not wait) and in which it asks again, seconds that are too far ahead; of each meter its
--   limits at once, of requests (-1: they are not even counted), of tokens (0: none); of day and month the most tokens and cost (-1: no limit),
--   tokens and cost used before Redis knew of them (-1: not known), seconds to keep it.
-- Answers {why not or {}, of each meter {requests, until empty, tokens with reserved, until empty},
--   {tokens, cost of the day, of the month, reserved}}; {{'unknown'}, {}, {}} where what was used before is needed.
local what, now, WINDOW, GRAIN = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local lease, id, reserved, used = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local costs, count = {reserved = tonumber(ARGV[9]), used = tonumber(ARGV[10])}, tonumber(ARGV[11])
local waited, again, FAR = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local HEAD = 14
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function window(key)
  local flat, parts, total = redis.call('HGETALL', key), {}, 0
  for i = 1, #flat, 2 do
    local at, amount = tonumber(flat[i]) * GRAIN, tonumber(flat[i + 1])
    -- One of a far future is from before the clock went back: it would count until the clock is there again.
    if at + WINDOW <= now or at > now + WINDOW then
      redis.call('HDEL', key, flat[i])
    else
      parts[#parts + 1] = {at, amount}
      total = total + amount
    end
  end
  table.sort(parts, function(a, b) return a[1] < b[1] end)
  return {total = total, parts = parts}
end

local function wait(found, gone)
  for _, part in ipairs(found.parts) do
    gone = gone - part[2]
    if gone <= 0 then return math.max(0, part[1] + WINDOW - now) end
  end
  return WINDOW
end

local function empty(found)
  local last = found.parts[#found.parts]
  return last and math.min(WINDOW, math.max(0, last[1] + WINDOW - now)) or 0
end

local function add(key, amount)
  redis.call('HINCRBY', key, string.format('%d', math.floor(now / GRAIN) + 1), string.format('%d', amount))
  redis.call('EXPIRE', key, WINDOW + 2)
end

local function drop_dead(leases, ...)
  local helds = {...}
  local function drop(from, to)
    for _, gone in ipairs(redis.call('ZRANGEBYSCORE', leases, from, to)) do
      redis.call('ZREM', leases, gone)
      for _, held in ipairs(helds) do redis.call('HDEL', held, gone) end
    end
  end
  drop('-inf', now)
  -- None lasts so long: the clock has gone back. Whoever lives renews it within a second.
  drop('(' .. string.format('%.6f', now + 2 * lease), '+inf')
end

local function since_of(kept) return tonumber(string.match(kept, '^%S+')) end

-- How many places those want who came before this one.
local function ahead(line)
  local flat, sum, mine = redis.call('HGETALL', line), 0, now - waited
  local known = redis.call('HGET', line, id)
  if known then mine = since_of(known) end
  for i = 1, #flat, 2 do
    local since, till, wanted = string.match(flat[i + 1], '^(%S+) (%S+) (%S+)$')
    since = tonumber(since)
    if tonumber(till) <= now or since > now + FAR then
      redis.call('HDEL', line, flat[i])
    elseif flat[i] ~= id and (since < mine or (since == mine and flat[i] < id)) then
      sum = sum + tonumber(wanted)
    end
  end
  return sum
end

local function join(line)
  local known = redis.call('HGET', line, id)
  local since = known and since_of(known) or now - waited
  redis.call('HSET', line, id, string.format('%.6f %.6f %d', since, now + again, reserved))
  redis.call('EXPIRE', line, math.ceil(again) + 60)
end

local function meter(m)
  local k, a = 4 * (m - 1), HEAD + 3 * (m - 1)
  local found = {requests = KEYS[k + 1], tokens = KEYS[k + 2], leases = KEYS[k + 3], held = KEYS[k + 4],
    once = tonumber(ARGV[a + 1]), rate = tonumber(ARGV[a + 2]), most = tonumber(ARGV[a + 3])}
  if found.rate < 0 then found.line = found.requests end
  drop_dead(found.leases, found.held)
  return found
end

local UNITS = {'tokens', 'cost'}

-- Each unit has what it may come to, what is held by request, and what this request now uses and reserves.
local function open_budget()
  local k, a = 4 * count, HEAD + 3 * count
  local found = {leases = KEYS[k + 1], periods = {},
    tokens = {held = KEYS[k + 2], used = used, reserved = reserved},
    cost = {held = KEYS[k + 3], used = costs.used, reserved = costs.reserved}}
  for index, name in ipairs({'day', 'month'}) do
    local b = a + 5 * (index - 1)
    found.periods[index] = {name = name, key = KEYS[k + 3 + index], tokens = tonumber(ARGV[b + 1]),
      cost = tonumber(ARGV[b + 2]), before = {ARGV[b + 3], ARGV[b + 4]}, keep = ARGV[b + 5]}
  end
  for _, period in ipairs(found.periods) do
    if redis.call('EXISTS', period.key) == 0 then
      if period.before[1] == '-1' then return end
      redis.call('HSET', period.key, 'tokens', period.before[1], 'cost', period.before[2])
      redis.call('EXPIRE', period.key, period.keep)
    end
  end
  drop_dead(found.leases, found.tokens.held, found.cost.held)
  return found
end

local function sum_held(held)
  local sum = 0
  for _, amount in ipairs(redis.call('HVALS', held)) do sum = sum + tonumber(amount) end
  return sum
end

local function text(n) return string.format('%.6f', n) end
local function whole(n) return string.format('%d', n) end

-- Of its tokens alone; of one that runs already, ``used`` and ``reserved`` take the place of what it held.
local function check_tokens(m)
  if m.most == 0 then return end
  if used + reserved > m.most then return {'tokens_per_minute', whole(m.most), whole(used + reserved), text(WINDOW), '1'} end
  local found, held = window(m.tokens), sum_held(m.held) - tonumber(redis.call('HGET', m.held, id) or 0)
  local over = found.total + held + used + reserved - m.most
  if m.line and what == 'reserve' and waited >= 0 then over = over + ahead(m.line) end
  if over > 0 then
    local seconds = held >= over and 1 or wait(found, over - held)
    return {'tokens_per_minute', whole(m.most), whole(used + reserved), text(seconds), '0'}
  end
end

local function check(m)
  local running = redis.call('ZCARD', m.leases)
  if m.once > 0 and running >= m.once then
    return {'requests_at_once', whole(m.once), whole(running + 1), '1', '0'}
  end
  if m.rate > 0 then
    local found = window(m.requests)
    if found.total >= m.rate then
      return {'requests_per_minute', whole(m.rate), '1', text(wait(found, found.total - m.rate + 1)), '0'}
    end
  end
  return check_tokens(m)
end

local function hold(leases, held, amount)
  if what == 'close' then
    redis.call('ZREM', leases, id)
    redis.call('HDEL', held, id)
  else
    redis.call('ZADD', leases, now + lease, id)
    redis.call('HSET', held, id, whole(amount))
    redis.call('EXPIRE', leases, math.ceil(lease) + 60)
    redis.call('EXPIRE', held, math.ceil(lease) + 60)
  end
end

local function overspent(budget)
  for _, period in ipairs(budget.periods) do
    for _, unit in ipairs(UNITS) do
      local limit, mine = period[unit], budget[unit]
      if limit >= 0 then
        local had, own = redis.call('HGET', period.key, unit), tonumber(redis.call('HGET', mine.held, id) or 0)
        local taken, asked = tonumber(had) + sum_held(mine.held), mine.used + mine.reserved - own
        if (what == 'reserve' or asked > 0) and (taken + asked > limit or taken >= limit) then
          return {'budget', period.name, unit, whole(limit), had}
        end
      end
    end
  end
end

local budget
if #KEYS > 4 * count then
  budget = open_budget()
  if not budget then return {{'unknown'}, {}, {}} end
end
local meters, refused = {}, {}
for m = 1, count do meters[m] = meter(m) end
if what == 'reserve' or what == 'change' then
  for index, m in ipairs(meters) do
    local found
    if what == 'reserve' then found = check(m) else found = check_tokens(m) end
    if found then
      if m.line and waited >= 0 then join(m.line) end
      table.insert(found, 1, whole(index - 1))
      refused = found
      break
    end
  end
  if budget and #refused == 0 then refused = overspent(budget) or {} end
end
if #refused == 0 and what ~= 'refresh' then
  for _, m in ipairs(meters) do
    if m.line then redis.call('HDEL', m.line, id) elseif what == 'reserve' then add(m.requests, 1) end
    if used > 0 then add(m.tokens, used) end
    hold(m.leases, m.held, reserved)
  end
  if budget then
    for _, unit in ipairs(UNITS) do
      local mine = budget[unit]
      for _, period in ipairs(budget.periods) do redis.call('HINCRBY', period.key, unit, whole(mine.used)) end
      hold(budget.leases, mine.held, mine.reserved)
    end
  end
end
local states = {}
for index, m in ipairs(meters) do
  local requests = m.line and {total = 0, parts = {}} or window(m.requests)
  local tokens, held = window(m.tokens), sum_held(m.held)
  states[index] = {text(requests.total), text(empty(requests)), text(tokens.total + held),
    text(held > 0 and WINDOW or empty(tokens))}
end
local spent = {}
if budget then
  for _, period in ipairs(budget.periods) do
    for _, unit in ipairs(UNITS) do spent[#spent + 1] = redis.call('HGET', period.key, unit) end
  end
  for _, unit in ipairs(UNITS) do spent[#spent + 1] = whole(sum_held(budget[unit].held)) end
end
return {refused, states, spent}
