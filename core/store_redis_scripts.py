"""What Redis does in one step, as Lua. Time is the server's own, so the callers' clocks need not agree."""

COMPARE_AND_SET = """
local held = redis.call('GET', KEYS[1])
if ARGV[1] == '1' then
  if held ~= ARGV[2] then return 0 end
elseif held then return 0 end
if ARGV[4] == '' then redis.call('SET', KEYS[1], ARGV[3])
else redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4]) end
return 1
"""

# The arithmetic of core.token_bucket. KEYS: the buckets. ARGV: forced, then (amount, capacity, refill per second) each.
# Answers (number of the bucket that makes one wait longest or 0, that wait in microseconds). An untouched bucket is
# full, so one that has filled up may vanish.
TAKE_TOKENS = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local levels, refused, longest = {}, 0, 0
for i, key in ipairs(KEYS) do
  local amount, capacity, refill = tonumber(ARGV[3*i-1]), tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1])
  local held = redis.call('HMGET', key, 'level', 'at')
  local level = capacity
  if held[1] then
    level = math.min(capacity, tonumber(held[1]) + math.max(0, now - tonumber(held[2])) * refill)
  end
  local wait = (math.min(amount, capacity) - level) / refill
  if wait > longest then refused, longest = i, wait end
  levels[i] = level
end
if refused > 0 and ARGV[1] == '0' then return {refused, math.ceil(longest * 1e6)} end
for i, key in ipairs(KEYS) do
  local amount, capacity, refill = tonumber(ARGV[3*i-1]), tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1])
  local level = math.min(capacity, levels[i] - amount)
  redis.call('HSET', key, 'level', string.format('%.6f', level), 'at', string.format('%.6f', now))
  redis.call('PEXPIRE', key, math.ceil((capacity - level) / refill * 1000) + 1000)
end
return {0, 0}
"""

# A sorted set of holders by the end of their lease. KEYS: the set. ARGV: lease in milliseconds, limit ('': none),
# holders. Answers 1, or 0 when the limit leaves no room for a holder that is new.
HOLD_SLOTS = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease = tonumber(ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if ARGV[2] ~= '' and not redis.call('ZSCORE', KEYS[1], ARGV[3])
    and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], now + lease, ARGV[i]) end
if redis.call('PTTL', KEYS[1]) < lease then redis.call('PEXPIRE', KEYS[1], lease) end
return 1
"""
