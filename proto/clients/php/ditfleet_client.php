#!/usr/bin/env php
<?php
// A ditfleet client: enqueues a job, watches it, prints its outcome. Needs phpredis (php-redis); the few fields of a job
// are written by hand.
//
//   php ditfleet_client.php REDIS MODEL URL [FIELD=VALUE...]
//
// REDIS is HOST:PORT or the path of a Unix socket, FIELD one of FIELDS below (PHP's integers end at 2^63 - 1).
// proto/PROTOCOL.md is the contract. The record under the id counts only if it is ours; see "How to submit a job" there.
const FIELDS = ['id' => 1, 'model' => 2, 'prompt' => 3, 'width' => 7, 'height' => 8, 'num_inference_steps' => 9, 'seed' => 13];
const STATES = ['UNKNOWN', 'QUEUED', 'DELAYED', 'LEASED', 'RUNNING', 'UPLOADING', 'RETRY_WAIT', 'SUCCEEDED', 'DEAD',
    'CANCELLED', 'EXPIRED'];

// ---- protobuf: a field is a key, number << 3 | type, and a varint (type 0) or a length and bytes (type 2)
function varint(int $n): string
{
    for ($bytes = ''; $n > 127; $n >>= 7)
        $bytes .= chr($n & 127 | 128);
    return $bytes . chr($n);
}

function field(int $number, string|int $value): string
{
    return is_int($value) ? varint($number << 3) . varint($value)
                          : varint($number << 3 | 2) . varint(strlen($value)) . $value;
}

// [number => its last value]; varints are integers, messages and strings bytes, the rest is skipped.
function decode(string $bytes): array
{
    $at = 0;
    $next = function () use ($bytes, &$at): int {
        for ($n = $shift = 0;; $shift += 7) {
            $byte = ord($bytes[$at++]);
            $n |= ($byte & 127) << $shift;
            if ($byte < 128)
                return $n;
        }
    };
    for ($fields = []; $at < strlen($bytes);) {
        $key = $next();
        $length = match ($key & 7) { 0 => 0, 1 => 8, 2 => $next(), 5 => 4 };
        $fields[$key >> 3] = ($key & 7) === 0 ? $next() : substr($bytes, $at, $length);
        $at += $length;
    }
    return $fields;
}

// The Result's fields; $on_event hears of each Event's.
function follow(Redis $redis, string $prefix, string $id, string $entry, callable $on_event): array
{
    $events = "{$prefix}ev:default:$id";
    $receipt = "{$prefix}ev:default:@$entry";
    for ($last = '0-0', $known = false;;) {
        ['entry' => $owner, 'result' => $result] = $redis->hMGet("{$prefix}job:default:$id", ['entry', 'result']);
        if (!($ours = $owner === $entry)) {
            ['same_as' => $same_as, 'result' => $refusal] =
                $redis->hMGet("{$prefix}job:default:@$entry", ['same_as', 'result']);
            if (!($ours = $same_as !== false))
                $result = $refusal;
        }
        // Blocks for a second at most, so that the record is read again even if no event comes.
        $streams = $ours ? [$events => $last] : [$receipt => '0-0'] + ($known ? [] : [$events => '0-0']);
        $news = $redis->xRead($streams, -1, $result === false ? 1000 : -1) ?: [];
        $known = $known || $news; // the record is there by now; if it is not ours, only the receipt can tell more
        foreach ($ours ? $news[$events] ?? [] : [] as $last => $fields)
            $on_event(decode($fields['event']));
        if ($result !== false)
            return decode($result);
    }
}

if ($argc < 4) {
    fwrite(STDERR, "usage: php ditfleet_client.php REDIS MODEL URL [FIELD=VALUE...]\n");
    exit(2);
}
[, $where, $model, $url] = $argv;
$values = ['id' => bin2hex(random_bytes(16)), 'model' => $model];
foreach (array_slice($argv, 4) as $given) {
    [$name, $value] = explode('=', $given, 2) + [1 => null];
    if (!isset(FIELDS[$name]) || $value === null) {
        fwrite(STDERR, "$given: a field is NAME=VALUE, NAME one of " . implode(' ', array_keys(FIELDS)) . "\n");
        exit(2);
    }
    $values[$name] = in_array($name, ['id', 'model', 'prompt']) ? $value : (int) $value;
}
$job = field(20, field(1, $url));
foreach ($values as $name => $value)
    $job .= field(FIELDS[$name], $value);

$redis = new Redis();
$redis->connect(...(preg_match('/^([^\/]*):(\d+)$/', $where, $m) ? [$m[1], (int) $m[2]] : [$where]));
$prefix = 'dit:{default}:';
$entry = $redis->xAdd("{$prefix}in:default", '*', ['job' => $job]);
$result = follow($redis, $prefix, $values['id'], $entry, fn ($e) => fwrite(STDERR,
    sprintf("%s %s %d/%d\n", STATES[$e[2] ?? 0], $e[3] ?? '', $e[4] ?? 0, $e[5] ?? 0)));
$error = isset($result[4]) ? decode($result[4]) : null;
echo STATES[$result[2]], ' ', $error ? "$error[1]: $error[2]" : decode($result[3])[1], "\n";
exit(STATES[$result[2]] === 'SUCCEEDED' ? 0 : 1);
