-- One request's meters, all or none; the arithmetic of server.limits.Meter.
-- KEYS: of each meter its requests, tokens (hashes of tenths of a second), leases, reserved (by request).
-- ARGV: admit|more|renew|end, now (0: Redis's clock), lease, id, reserved, used; of each meter at once, requests, tokens.
-- Answers {excess or {}, of each meter {requests, until empty, tokens with reserved, until empty}}.
local MINUTE, GRAIN = 60, 0.1
local what, now, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local id, reserved, used = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function window(key)
  local flat, parts, total = redis.call('HGETALL', key), {}, 0
  for i = 1, #flat, 2 do
    local at, amount = tonumber(flat[i]) * GRAIN, tonumber(flat[i + 1])
    if at + MINUTE <= now then
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
    if gone <= 0 then return math.max(0, part[1] + MINUTE - now) end
  end
  return MINUTE
end

local function empty(found)
  local last = found.parts[#found.parts]
  return last and math.min(MINUTE, math.max(0, last[1] + MINUTE - now)) or 0
end

local function add(key, amount)
  redis.call('HINCRBY', key, string.format('%d', math.floor(now / GRAIN) + 1), string.format('%d', amount))
  redis.call('EXPIRE', key, MINUTE + 2)
end

local function meter(m)
  local k, a = 4 * (m - 1), 6 + 3 * (m - 1)
  local found = {requests = KEYS[k + 1], tokens = KEYS[k + 2], leases = KEYS[k + 3], held = KEYS[k + 4],
    once = tonumber(ARGV[a + 1]), rate = tonumber(ARGV[a + 2]), most = tonumber(ARGV[a + 3])}
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', found.leases, '-inf', now)) do
    redis.call('ZREM', found.leases, gone)
    redis.call('HDEL', found.held, gone)
  end
  return found
end

local function sum_held(m)
  local sum = 0
  for _, tokens in ipairs(redis.call('HVALS', m.held)) do sum = sum + tonumber(tokens) end
  return sum
end

local function text(n) return string.format('%.6f', n) end
local function whole(n) return string.format('%d', n) end

-- Of its tokens alone; of one that runs already, ``used`` and ``reserved`` take the place of what it held.
local function short(m)
  if m.most == 0 then return end
  if used + reserved > m.most then return {'tokens_per_minute', whole(m.most), whole(used + reserved), '60', '1'} end
  local found, held = window(m.tokens), sum_held(m) - tonumber(redis.call('HGET', m.held, id) or 0)
  local over = found.total + held + used + reserved - m.most
  if over > 0 then
    local seconds = held >= over and 1 or wait(found, over - held)
    return {'tokens_per_minute', whole(m.most), whole(used + reserved), text(seconds), '0'}
  end
end

local function excess(m)
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
  return short(m)
end

local meters, refused = {}, {}
for m = 1, #KEYS / 4 do meters[m] = meter(m) end
if what == 'admit' or what == 'more' then
  for index, m in ipairs(meters) do
    local found
    if what == 'admit' then found = excess(m) else found = short(m) end
    if found then
      table.insert(found, 1, whole(index - 1))
      refused = found
      break
    end
  end
end
if #refused == 0 then
  for _, m in ipairs(meters) do
    if what == 'admit' then add(m.requests, 1) end
    if used > 0 then add(m.tokens, used) end
    if what == 'end' then
      redis.call('ZREM', m.leases, id)
      redis.call('HDEL', m.held, id)
    else
      redis.call('ZADD', m.leases, now + lease, id)
      redis.call('HSET', m.held, id, whole(reserved))
      redis.call('EXPIRE', m.leases, math.ceil(lease) + 60)
      redis.call('EXPIRE', m.held, math.ceil(lease) + 60)
    end
  end
end
local states = {}
for index, m in ipairs(meters) do
  local requests, tokens, held = window(m.requests), window(m.tokens), sum_held(m)
  states[index] = {text(requests.total), text(empty(requests)), text(tokens.total + held),
    text(held > 0 and MINUTE or empty(tokens))}
end
return {refused, states}
