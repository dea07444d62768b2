// sim_model.c: the model of Redis (store.h, server.h) beside a real server: the same commands to both, the same replies
// and keys expected.
//
// First single commands, drawn from the lines of `grammar`, wrong ones among them; then whole operations of queue.lua,
// the script itself on both sides. There the real server must live by our clock: `prelude` puts it in the place of
// what a script learns of time.
#include "random.h"
#include "server.h"
#include "tests/unit/private_redis.h"

#include "proto/queue_lua.h"
#include "proto/redis.h"

#include <hiredis/hiredis.h>
#include <inttypes.h>
#include <stdarg.h>

#define P "dit:{sim}:"

enum { WORDS = 80, WORD = 96 };

struct pair {
    redisContext *real;
    struct server *model;
    uint64_t random;
    int64_t clock_us; // of the script's time
    struct text argv[WORDS];
    char words[WORDS][WORD];
    size_t argc;
    unsigned long commands, replies_of_error;
    // what the random operations know
    char entries[8][48];
    char sha1[41], model_sha1[41]; // of the script, with our clock and as it is
    struct known {
        char id[16], epoch[24], nonce[40];
    } held[16];
    unsigned n_held, jobs, draws;
};

// ---- one command to both

static void say(struct pair *p, const char *word, size_t length)
{
    char *to = p->words[p->argc];
    length = length < WORD - 1 ? length : WORD - 1;
    memcpy(to, word, length);
    to[length] = 0;
    p->argv[p->argc++] = (struct text){to, length};
}

static void begin(struct pair *p)
{
    p->argc = 0;
}

static void says(struct pair *p, const char *format, ...)
{
    char line[1024], *save = NULL;
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *word = strtok_r(line, " ", &save); word; word = strtok_r(NULL, " ", &save))
        say(p, strcmp(word, "''") == 0 ? "" : word, strcmp(word, "''") == 0 ? 0 : strlen(word));
}

static redisReply *ask_real(struct pair *p)
{
    const char *argv[WORDS];
    size_t lengths[WORDS];
    for (size_t i = 0; i < p->argc; i++) {
        argv[i] = p->argv[i].bytes;
        lengths[i] = p->argv[i].length;
    }
    return redisCommandArgv(p->real, (int)p->argc, argv, lengths);
}

static redisReply *ask_model(struct pair *p)
{
    struct buffer out = {0};
    void *reply = NULL;
    redisReader *reader = redisReaderCreate();
    store_clean(server_store(p->model));
    if (text_is(p->argv[0], "EVALSHA"))
        p->argv[1] = text_of(p->model_sha1);
    server_run(p->model, p->argc, p->argv, &out);
    redisReaderFeed(reader, out.bytes, out.length);
    redisReaderGetReply(reader, &reply);
    redisReaderFree(reader);
    buffer_free(&out);
    return reply;
}

// ---- replies compared

static bool is_text(const redisReply *r)
{
    return r->type == REDIS_REPLY_STRING || r->type == REDIS_REPLY_STATUS || r->type == REDIS_REPLY_ERROR;
}

static bool same_number(const redisReply *a, const redisReply *b)
{
    char *end_a, *end_b;
    return strtod(a->str, &end_a) == strtod(b->str, &end_b) && !*end_a && !*end_b && end_a != a->str;
}

// 'e' as they are; 's' scores are numbers, printed as the server's version does; 't' times may differ by a second.
static bool same(const redisReply *a, const redisReply *b, char how)
{
    if (a->type != b->type)
        return false;
    if (is_text(a))
        return (a->len == b->len && memcmp(a->str, b->str, a->len) == 0) || (how == 's' && same_number(a, b));
    if (a->type == REDIS_REPLY_INTEGER)
        return a->integer == b->integer || (how == 't' && llabs(a->integer - b->integer) < 1000);
    if (a->type != REDIS_REPLY_ARRAY)
        return true;
    bool good = a->elements == b->elements;
    for (size_t i = 0; i < a->elements && good; i++)
        good = same(a->element[i], b->element[i], how);
    return good;
}

// The model's hashes are in order of insertion, a server's not always.
static void sort_reply(redisReply *r, size_t width)
{
    for (size_t i = width; i + width <= r->elements; i += width)
        for (size_t k = i; k >= width && strcmp(r->element[k - width]->str, r->element[k]->str) > 0; k -= width)
            for (size_t w = 0; w < width; w++) {
                redisReply *moved = r->element[k - width + w];
                r->element[k - width + w] = r->element[k + w];
                r->element[k + w] = moved;
            }
}

static void print_reply(const redisReply *r, int depth)
{
    if (r->type == REDIS_REPLY_INTEGER)
        printf("%*s%lld\n", 2 * depth, "", r->integer);
    else if (r->type == REDIS_REPLY_ARRAY)
        printf("%*sarray of %zu\n", 2 * depth, "", r->elements);
    else
        printf("%*s%.*s\n", 2 * depth, "", (int)r->len, r->str ? r->str : "(nil)");
    for (size_t i = 0; r->type == REDIS_REPLY_ARRAY && i < r->elements; i++)
        print_reply(r->element[i], depth + 1);
}

static bool text_begins(struct text a, const char *start)
{
    return a.length >= strlen(start) && memcmp(a.bytes, start, strlen(start)) == 0;
}

// Asks both, and compares. The reply is the caller's; NULL: they differ, which is printed.
static redisReply *compare(struct pair *p)
{
    redisReply *real = ask_real(p), *model = ask_model(p);
    const struct text name = p->argv[0];
    size_t pairs = text_is(name, "HGETALL") ? 2 : text_is(name, "HKEYS") || text_is(name, "KEYS") ? 1 : 0;
    char how = text_is(name, "PTTL") ? 't' : text_begins(name, "Z") ? 's' : 'e';
    bool stats = p->argc > 5 && text_is(p->argv[0], "EVALSHA") && text_is(p->argv[5], "stats");
    p->commands++;
    if (!real || !model || real->type == REDIS_REPLY_ERROR)
        p->replies_of_error++;
    if (real && model && real->type == REDIS_REPLY_ARRAY && model->type == REDIS_REPLY_ARRAY && (pairs || stats)) {
        sort_reply(real, stats ? 2 : pairs);
        sort_reply(model, stats ? 2 : pairs);
    }
    if (real && model && same(real, model, how)) {
        freeReplyObject(model);
        return real;
    }
    printf("the model and Redis differ:");
    for (size_t i = 0; i < p->argc; i++)
        printf(" '%.*s'", (int)p->argv[i].length, p->argv[i].bytes);
    printf("\nRedis:\n");
    if (real)
        print_reply(real, 1);
    printf("model:\n");
    if (model)
        print_reply(model, 1);
    freeReplyObject(real);
    freeReplyObject(model);
    return NULL;
}

static bool agree(struct pair *p)
{
    redisReply *reply = compare(p);
    freeReplyObject(reply);
    return reply != NULL;
}

static int64_t ask_number(struct pair *p, const char *command, const char *key)
{
    redisReply *r = redisCommand(p->real, "%s %s", command, key);
    int64_t n = r && r->type == REDIS_REPLY_INTEGER ? r->integer : -3;
    freeReplyObject(r);
    return n;
}

// ---- all keys compared

static bool count_key(void *arg, struct text key)
{
    (void)key;
    ++*(int64_t *)arg;
    return true;
}

static bool same_key(struct pair *p, const char *key, bool exact_time)
{
    struct store *s = server_store(p->model);
    begin(p);
    switch (store_type(s, text_of(key))) {
    case STORE_STRING:
        says(p, "GET %s", key);
        break;
    case STORE_HASH:
        says(p, "HGETALL %s", key);
        break;
    case STORE_ZSET:
        says(p, "ZRANGE %s 0 -1 WITHSCORES", key);
        break;
    case STORE_STREAM:
        says(p, "XRANGE %s - +", key);
        break;
    default:
        says(p, "EXISTS %s", key);
    }
    if (!agree(p))
        return false;
    int64_t expires = store_expires(s, text_of(key)), real = ask_number(p, "PEXPIRETIME", key);
    bool good = exact_time ? real == (expires ? expires : -1) : (real > 0) == (expires > 0);
    if (!good)
        printf("%s expires at %" PRId64 ", in the model at %" PRId64 "\n", key, real, expires);
    return good;
}

static bool same_keys(struct pair *p, bool exact_time)
{
    int64_t n = 0;
    redisReply *keys = redisCommand(p->real, "KEYS *");
    store_each(server_store(p->model), count_key, &n);
    bool good = keys && n == (int64_t)keys->elements;
    if (!good)
        printf("Redis has %zu keys, the model %" PRId64 "\n", keys ? keys->elements : 0, n);
    for (size_t i = 0; good && i < keys->elements; i++)
        good = same_key(p, keys->element[i]->str, exact_time);
    freeReplyObject(keys);
    return good;
}

// ---- single commands
// Words in lower case stand for something drawn: h z s t keys; f field, v value, n number, d score, m member, i id, g
// group, c consumer, e time to live. A word with ? may be left out; x is one that is wrong.

static const char *const grammar[] = {
    "GET t",
    "SET t v",
    "EXISTS h z",
    "DEL k",
    "PEXPIRE k e ?GT",
    "PEXPIRE k e ?LT",
    "PEXPIRE k e ?x",
    "PTTL k",
    "PERSIST k",
    "HSTRLEN h f",
    "XRANGE s (i + COUNT n",
    "HGET h f",
    "HMGET h f ?f ?f",
    "HGETALL h",
    "HKEYS h",
    "HSET h f v ?f ?v",
    "HSET h f n f v",
    "HSETNX h f v",
    "HDEL h f ?f",
    "HINCRBY h f n",
    "ZADD z ?NX d m ?d ?m",
    "ZADD z ?GT ?CH d m",
    "ZADD z ?LT d m ?GT ?NX ?XX",
    "ZADD z ?XX ?GT d m d m",
    "ZREM z m ?m",
    "ZCARD z",
    "ZSCORE z m",
    "ZRANGE z n n ?WITHSCORES",
    "ZRANGEBYSCORE z d d ?WITHSCORES",
    "ZRANGEBYSCORE z -inf d LIMIT n n",
    "ZRANGEBYSCORE z (d +inf ?x",
    "XADD s i f v ?f ?v",
    "XADD s MAXLEN ~ 1000000 i f v",
    "XADD s MAXLEN n i f v",
    "XDEL s i ?i",
    "XLEN s",
    "XRANGE s i i",
    "XRANGE s - + COUNT n",
    "XREVRANGE s + - COUNT n",
    "XREVRANGE s i i ?x",
    "XACK s g i ?i ?i",
    "XACK s g i i i",
    "XGROUP CREATE s g 0 ?MKSTREAM",
    "XGROUP CREATE s g i ?MKSTREAM",
    "XGROUP DESTROY s g",
    "XREADGROUP GROUP g c COUNT 3 STREAMS s >",
    "XREADGROUP GROUP g c COUNT 3 STREAMS s s > >",
    "XREADGROUP GROUP g c COUNT n STREAMS s >",
    "XAUTOCLAIM s g c 0 0-0 COUNT 2",
    "XAUTOCLAIM s g c 100000000 0-0",
    "XAUTOCLAIM s g c 0 i COUNT n",
    "XREAD COUNT 2 STREAMS s i",
    "XREAD STREAMS s s 0 i",
};

static void draw_id(struct pair *p, char *out)
{
    const unsigned ms = random_below(&p->random, 40) + (unsigned)(p->commands / 60), how = random_below(&p->random, 12);
    if (how < 6)
        snprintf(out, WORD, "%u-*", ms);
    else if (how < 9)
        snprintf(out, WORD, "%u-%u", ms, random_below(&p->random, 4));
    else if (how < 11)
        snprintf(out, WORD, "%u", ms);
    else
        snprintf(out, WORD, "%s", random_once_in(&p->random, 2) ? "0-0" : "7-x");
}

static const char *draw_wrong(struct pair *p)
{
    static const char *const wrong[] = {
        "",    "-0",  "01",  "+1",    "1e3", " 1", "9223372036854775807", "-9223372036854775808", "9223372036854775808",
        "nan", "1.5", "abc", "1-2-3", "-"};
    return wrong[random_below(&p->random, sizeof wrong / sizeof *wrong)];
}

static void draw_word(struct pair *p, const char *word, char *out)
{
    unsigned n = random_below(&p->random, 1u << 20);
    bool key = strchr("hzstk", *word) && !word[1];
    if (key && random_once_in(&p->random, 30)) // of another type
        word = "k";
    if (strcmp(word, "k") == 0)
        word = (const char *const[]){"h", "z", "s", "t"}[n / 8 % 4];
    if (strlen(word) > 1 + (*word == '('))
        snprintf(out, WORD, "%s", word);
    else if (key)
        snprintf(out, WORD, "%s%u", word, n % 3);
    else if (*word == 'x' || (!key && strchr("nde", *word) && random_once_in(&p->random, 25)))
        snprintf(out, WORD, "%s", draw_wrong(p));
    else if (*word == 'i')
        draw_id(p, out);
    else if (strcmp(word, "(i") == 0)
        snprintf(out, WORD, "(%u-%u", n % 60, n % 3);
    else if (*word == 'e')
        snprintf(out, WORD, "%u", random_once_in(&p->random, 10) ? 0 : 100000 + n * 1000);
    else if (*word == 'n')
        snprintf(out, WORD, "%d", (int)(n % 12) - 4);
    else if (*word == 'd' || *word == '(')
        snprintf(out, WORD, "%s%.10g", *word == '(' ? "(" : "", ((int)(n % 80) - 40) / 4.0);
    else if (*word == 'v' && n % 7 == 0)
        snprintf(out, WORD, "%0*u", 70, n); // a hash of these is in another order
    else
        snprintf(out, WORD, "%c%u", *word, n % (strchr("fm", *word) ? 6 : 2));
}

static void draw_command(struct pair *p)
{
    char line[128], *save = NULL, word[WORD];
    snprintf(line, sizeof line, "%s", grammar[random_below(&p->random, sizeof grammar / sizeof *grammar)]);
    begin(p);
    for (char *w = strtok_r(line, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
        bool optional = *w == '?';
        if (optional && random_below(&p->random, 3) != 0)
            continue;
        bool drawn = strlen(w + optional) == 1 || (*w == '(' && strlen(w) == 2);
        if (!drawn || *w == '>' || *w == '~' || *w == '+' || *w == '-' || (*w >= '0' && *w <= '9'))
            snprintf(word, sizeof word, "%s", w + optional);
        else
            draw_word(p, w + optional, word);
        say(p, word, strlen(word));
    }
}

static void follow_clock(struct pair *p)
{
    redisReply *t = redisCommand(p->real, "TIME");
    store_set_clock(server_store(p->model), atoll(t->element[0]->str) * 1000000 + atoll(t->element[1]->str));
    freeReplyObject(t);
}

static bool single_commands(struct pair *p, unsigned long n)
{
    bool good = true;
    for (unsigned long i = 0; i < n && good; i++) {
        if (i % 64 == 0)
            follow_clock(p);
        draw_command(p);
        good = agree(p) && (i % 200 != 199 || same_keys(p, false));
    }
    return good && same_keys(p, false);
}

// XADD's ~ leaves more on the server, never less, and the newest are the same.
static bool about_maxlen(struct pair *p)
{
    bool good = true;
    for (int i = 1; i <= 450 && good; i++) {
        begin(p);
        says(p, "XADD long MAXLEN ~ 100 %d-1 f v", i);
        good = agree(p);
    }
    begin(p);
    says(p, "XREVRANGE long + - COUNT 100");
    good = good && agree(p);
    size_t left = store_size(server_store(p->model), text_of("long"));
    int64_t there = ask_number(p, "XLEN", "long");
    if (left >= 200 || there < (int64_t)left || there >= 300)
        printf("MAXLEN ~ 100 left %zu of 450, on Redis %" PRId64 "\n", left, there), good = false;
    return good;
}

// ---- whole operations

static const char prelude[] =
    "local clock_s, clock_us = KEYS[2]:match('^(%d+)%.(%d+)$')\n"
    "local clock_ms = clock_s * 1000 + math.floor(clock_us / 1000)\n"
    "local function timed_call(name, ...)\n"
    "  local a = { ... }\n"
    "  if name == 'TIME' then return { clock_s, clock_us } end\n"
    "  if name == 'XADD' then\n"
    "    for i = 2, #a do if a[i] == '*' then a[i] = string.format('%.0f-*', clock_ms) break end end\n"
    "  elseif name == 'PEXPIRE' then name, a[2] = 'PEXPIREAT', string.format('%.0f', clock_ms + a[2])\n"
    "  elseif name == 'PTTL' then\n"
    "    local at = redis.call('PEXPIRETIME', a[1])\n"
    "    return at < 0 and at or at - clock_ms\n"
    "  end\n"
    "  return redis.call(name, unpack(a))\n"
    "end\n";

// The real server knows the script with our clock in it, the model as it is.
static bool load_real(struct pair *p, struct text script)
{
    static const struct patch timed = {"the clock", "redis.call, string.char", "timed_call, string.char"};
    size_t length;
    char *text = patch_apply(script, &timed, &length);
    if (!text) {
        printf("queue.lua does not begin as it did: see load_real\n");
        return false;
    }
    char *whole = sim_alloc(sizeof prelude + length);
    memcpy(whole, prelude, sizeof prelude - 1);
    memcpy(whole + sizeof prelude - 1, text, length);
    redisReply *r = redisCommand(p->real, "SCRIPT LOAD %b", whole, sizeof prelude - 1 + length);
    bool good = r && r->type == REDIS_REPLY_STRING;
    snprintf(p->sha1, sizeof p->sha1, "%s", r && r->str ? r->str : "");
    if (!good)
        printf("SCRIPT LOAD: %s\n", p->sha1);
    freeReplyObject(r);
    free(text);
    free(whole);
    return good;
}

static void load_model(struct pair *p, struct text script)
{
    const struct text eval[] = {text_of("EVAL"), script, text_of("1"), text_of(P), text_of("stats")};
    struct redis_script named;
    struct buffer out = {0};
    redis_script(&named, script.bytes, script.length);
    snprintf(p->model_sha1, sizeof p->model_sha1, "%s", named.sha1);
    server_run(p->model, sizeof eval / sizeof *eval, eval, &out);
    buffer_free(&out);
}

static void pass_time(struct pair *p)
{
    if (!random_once_in(&p->random, 4))
        p->clock_us += random_below(&p->random, random_once_in(&p->random, 20) ? 20000000 : 400000);
    store_set_clock(server_store(p->model), p->clock_us);
}

static void op(struct pair *p, const char *name)
{
    begin(p);
    says(p, "EVALSHA %s 2 " P " %" PRId64 ".%06" PRId64 " %s", p->sha1, p->clock_us / 1000000, p->clock_us % 1000000,
         name);
}

static const char *draw_tenant(struct pair *p)
{
    return random_once_in(&p->random, 3) ? "acme" : "default";
}

// Submissions, delivered and admitted: new ids, the same again, other bytes, refused ones.
static bool submit(struct pair *p)
{
    begin(p);
    unsigned id = random_once_in(&p->random, 4) ? random_below(&p->random, p->jobs + 1) : p->jobs++;
    says(p, "XADD " P "in:%s %" PRId64 "-* job payload-%u-%u", id % 3 ? "default" : "acme", p->clock_us / 1000, id,
         random_once_in(&p->random, 20));
    return agree(p);
}

static void say_entry(struct pair *p, const redisReply *entry)
{
    const char *payload = entry->element[1]->element[1]->str;
    const int64_t now = p->clock_us / 1000;
    unsigned n = random_below(&p->random, 1000);
    char id[16] = "j";
    strncat(id, payload + 8, strcspn(payload + 8, "-"));
    bool refused = n % 10 == 0;
    says(p, "%s %s %s 11 m@%u %s %u %" PRId64 " %" PRId64 " %u", entry->element[0]->str, id, payload, n % 2,
         n % 3   ? "normal"
         : n % 2 ? "high"
                 : "low",
         n % 4 ? n : 0, n % 5 == 1 ? now + 1 + n * 20 : 0, n % 5 == 2 ? now + n * 10 : 0, n % 7 ? 0 : 1 + n % 3);
    says(p, "batch%u %s %s %s", n % 2, n % 4 == 1 ? "https://h/?q" : "''", refused ? "invalid" : "''",
         refused ? "no-good" : "''");
}

static bool admit(struct pair *p)
{
    const char *tenant = draw_tenant(p);
    begin(p);
    says(p, "XREADGROUP GROUP admit node COUNT 3 STREAMS " P "in:%s >", tenant);
    redisReply *r = compare(p);
    if (!r || r->type != REDIS_REPLY_ARRAY) {
        freeReplyObject(r);
        return r != NULL;
    }
    op(p, "admit");
    says(p, "%s", tenant);
    const redisReply *entries = r->element[0]->element[1];
    for (size_t i = 0; i < entries->elements; i++)
        say_entry(p, entries->element[i]);
    freeReplyObject(r);
    return agree(p);
}

static bool claim(struct pair *p)
{
    unsigned most = 1 + random_below(&p->random, 3);
    op(p, "claim");
    says(p, "w%u i%u %u %u", random_below(&p->random, 2), random_below(&p->random, 2),
         1 + random_below(&p->random, 9000), most);
    for (unsigned i = 0; i < most; i++) // now and then a nonce that was used before
        says(p, "nonce%u", p->draws++ - (random_once_in(&p->random, 8) ? 3 : 0));
    says(p, "m@0 m@1");
    redisReply *r = compare(p);
    for (size_t i = 1; r && i < r->elements; i++) {
        struct known *k = &p->held[p->n_held++ % 16];
        snprintf(k->id, sizeof k->id, "%s", r->element[i]->element[1]->str);
        snprintf(k->epoch, sizeof k->epoch, "%s", r->element[i]->element[2]->str);
        snprintf(k->nonce, sizeof k->nonce, "%s", r->element[i]->element[3]->str);
    }
    freeReplyObject(r);
    return r != NULL;
}

static bool hold(struct pair *p)
{
    static const char *const ops[] = {"beat", "beat", "beat", "finish", "fail", "fail", "release"};
    unsigned n = random_below(&p->random, 1000), what = n % 7;
    const struct known *k = &p->held[random_below(&p->random, 16)];
    op(p, ops[what]);
    says(p, "%s %s %s %s", n % 11 == 0 || atoi(k->id + 1) % 3 == 0 ? "acme" : "default", *k->id ? k->id : "none",
         *k->epoch ? k->epoch : "1", *k->nonce && n % 13 ? k->nonce : "nonce");
    if (what < 3)
        says(p, what ? "%u %s text %u 20 %u.%u" : "%u", n % 2 * n * 20, n % 3 ? "RUNNING" : "UPLOADING", n % 20, n,
             n % 9);
    else if (what == 3)
        says(p, "result");
    else if (what < 6)
        says(p, "%s timeout it-failed %u 0.%u", n % 3 ? "app" : "infra", n % 4 > 0, n);
    return agree(p);
}

static bool callbacks(struct pair *p)
{
    op(p, "callbacks");
    says(p, "2 5000 3 acme %u", random_below(&p->random, 4));
    redisReply *r = compare(p);
    for (size_t i = 1; r && i < r->elements; i++) {
        static const char *const ops[] = {"callback_done", "callback_retry", "callback_dead"};
        unsigned what = random_below(&p->random, 4);
        if (what == 3)
            continue; // its lease runs out
        op(p, ops[what]);
        says(p, "%s %lld", r->element[i]->element[0]->str, r->element[i]->element[1]->integer);
        says(p, what == 1 ? "1500 %u" : what == 2 ? "upload gone https://h/%u" : "", random_below(&p->random, 2));
        if (!agree(p)) {
            freeReplyObject(r);
            return false;
        }
    }
    freeReplyObject(r);
    return r != NULL;
}

// Dead letters: listed, one of them tried again or thrown away.
static bool dead(struct pair *p)
{
    char letter[48] = "1-1";
    op(p, "dead");
    says(p, "''");
    redisReply *r = compare(p);
    if (r && r->elements > 0)
        snprintf(letter, sizeof letter, "%s",
                 r->element[random_below(&p->random, (unsigned)r->elements)]->element[0]->str);
    freeReplyObject(r);
    op(p, random_once_in(&p->random, 4) ? "dead_drop" : "dead_retry");
    says(p, "%s", letter);
    return r && agree(p);
}

static bool rare(struct pair *p)
{
    static const char *const lines[] = {"doors",
                                        "stats",
                                        "pools",
                                        "publish m 0",
                                        "publish m 1",
                                        "withdraw m 1",
                                        "set backoff_ms 3000",
                                        "set no_such 1",
                                        "set max_attempts_infra 4",
                                        "set outbox_max 3",
                                        "set max_backlog_ms 9000",
                                        "set max_backlog_ms 0",
                                        "tenant acme 2.5 '' '' ''",
                                        "tenant acme '' 0.5 700 ''",
                                        "tenant acme 1.5 0 0 0",
                                        "tenant default 1 '' '' 6000"};
    char line[64];
    op(p, "");
    snprintf(line, sizeof line, "%s", lines[random_below(&p->random, sizeof lines / sizeof *lines)]);
    says(p, "%s", line);
    return agree(p);
}

static bool upkeep(struct pair *p)
{
    unsigned n = random_below(&p->random, 1000);
    op(p, n % 4 == 0 ? "release_all" : n % 4 == 1 ? "cancel" : "reap");
    if (n % 4 == 0)
        says(p, "w%u %s timeout it-died 0.%u", n % 2, n % 3 ? n % 5 ? "i0" : "i1" : "''", n);
    else if (n % 4 == 1)
        says(p, "%s j%u", draw_tenant(p), random_below(&p->random, p->jobs + 1));
    else
        says(p, "0.%u", n);
    return agree(p);
}

// Each key must be the same in the end, and expire at the same millisecond.
static bool operations(struct pair *p, unsigned long n)
{
    static bool (*const all[])(struct pair *) = {submit, submit, submit, submit,    admit, admit,  claim, claim,
                                                 hold,   hold,   hold,   callbacks, rare,  upkeep, dead};
    const struct text script = {queue_lua_start, (size_t)(queue_lua_end - queue_lua_start)};
    load_model(p, script);
    bool good = load_real(p, script);
    for (const char *const *line = (const char *const[]){"tenant acme 2 0 0 0", "publish m 0", "publish m 1", NULL};
         good && *line; line++) {
        pass_time(p);
        op(p, "");
        says(p, "%s", *line);
        good = agree(p);
    }
    for (unsigned long i = 0; i < n && good; i++) {
        pass_time(p);
        good = all[random_below(&p->random, sizeof all / sizeof *all)](p) && (i % 100 != 99 || same_keys(p, true));
    }
    return good && same_keys(p, true);
}

// ---- the program

static bool run(struct private_redis *server, uint64_t seed, unsigned long n, unsigned long *commands,
                unsigned long *errors)
{
    struct pair *p = sim_alloc(sizeof *p);
    p->random = seed;
    p->clock_us = 4102444800000000;                               // 2100: nothing expires on the real server
    for (int i = 0; i < 100 && (!p->real || p->real->err); i++) { // its socket is there before it listens
        usleep(p->real ? 10000 : 0);
        redisFree(p->real);
        p->real = redisConnectUnix(server->socket);
    }
    p->model = server_new(NULL, false);
    bool good = p->real && !p->real->err;
    freeReplyObject(good ? redisCommand(p->real, "FLUSHALL") : NULL);
    good = good && single_commands(p, n) && about_maxlen(p);
    server_free(p->model);
    p->model = server_new(NULL, false);
    freeReplyObject(good ? redisCommand(p->real, "FLUSHALL") : NULL);
    good = good && operations(p, n / 4);
    if (!good)
        printf("again: --seed %" PRIu64 " --commands %lu; command %lu\n", seed, n, p->commands);
    *commands += p->commands;
    *errors += p->replies_of_error;
    redisFree(p->real);
    server_free(p->model);
    free(p);
    return good;
}

int main(int argc, char **argv)
{
    struct private_redis server = {0};
    uint64_t first = 1, last = 3;
    unsigned long n = 3000, commands = 0, errors = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--seed") == 0)
            first = last = strtoull(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--commands") == 0)
            n = strtoul(argv[i + 1], NULL, 10);
        else {
            fprintf(stderr, "usage: sim_model [--seed N] [--commands N]\n");
            return 2;
        }
    }
    if (private_redis_start(&server, NULL) != 0) {
        fprintf(stderr, "no Redis server could be started\n");
        return 1;
    }
    bool good = true;
    for (uint64_t seed = first; seed <= last && good; seed++)
        good = run(&server, seed, n, &commands, &errors);
    private_redis_stop(&server);
    if (good)
        printf("the model and Redis agree on %lu commands, %lu of them refused\n", commands, errors);
    return !good;
}
