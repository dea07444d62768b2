// algo_cache.c: the file is "ditfleet-algorithms 1 <numbers in a key>: <words>", then a line an entry:
//   <key: decimal numbers> : <algorithm: 8 words of 16 hex digits> <checksum of what is before it: 8 hex digits>
#include "kernels/algo_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { WORDS = 256, LINE = 1024, MOST_ENTRIES = 4096, MOST_BYTES = MOST_ENTRIES * LINE };

struct entry {
    int64_t key[ALGO_KEY_MAX]; // 0 beyond key_n
    uint64_t algo[ALGO_WORDS];
};

struct algo_cache {
    char folder[PATH_MAX], path[PATH_MAX], head[WORDS + 64]; // path "": nothing is read or written
    int key_n;
    bool fresh; // entries that the file may not have
    size_t count, room;
    struct entry *list;
};

static uint64_t fnv(const char *text, size_t n)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ (uint8_t)text[i]) * 0x100000001b3u;
    return hash;
}

static uint32_t checksum(const char *text, size_t n)
{
    const uint64_t hash = fnv(text, n);
    return (uint32_t)(hash ^ hash >> 32);
}

bool algo_cache_folder(char *out, size_t size)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n = -1;
    if (cache && cache[0] == '/')
        n = snprintf(out, size, "%s/ditfleet", cache);
    else if (home && home[0] == '/')
        n = snprintf(out, size, "%s/.cache/ditfleet", home);
    return n > 0 && (size_t)n < size;
}

// ---- entries

static struct entry *entry_of(const struct algo_cache *c, const int64_t *key)
{
    for (size_t i = 0; i < c->count; i++)
        if (memcmp(c->list[i].key, key, (size_t)c->key_n * sizeof *key) == 0)
            return &c->list[i];
    return NULL;
}

bool algo_cache_find(const struct algo_cache *c, const int64_t *key, uint64_t algo[ALGO_WORDS])
{
    const struct entry *e = entry_of(c, key);
    if (e)
        memcpy(algo, e->algo, sizeof e->algo);
    return e != NULL;
}

// False: no room.
static bool set(struct algo_cache *c, const int64_t *key, const uint64_t *algo)
{
    struct entry *e = entry_of(c, key);
    if (!e && c->count == MOST_ENTRIES)
        return false;
    if (!e && c->count == c->room) {
        const size_t room = c->room ? 2 * c->room : 64;
        struct entry *list = realloc(c->list, room * sizeof *list);
        if (!list)
            return false;
        c->list = list;
        c->room = room;
    }
    if (!e) {
        e = &c->list[c->count++];
        memset(e, 0, sizeof *e);
        memcpy(e->key, key, (size_t)c->key_n * sizeof *key);
    }
    memcpy(e->algo, algo, sizeof e->algo);
    return true;
}

void algo_cache_put(struct algo_cache *c, const int64_t *key, const uint64_t algo[ALGO_WORDS])
{
    if (set(c, key, algo))
        c->fresh = true;
}

// ---- reading

// The number at *at, which ends with the character `end`; *at moves past that.
static bool take_decimal(const char **at, char end, int64_t *out)
{
    char *stop;
    if (**at != '-' && (**at < '0' || **at > '9'))
        return false;
    errno = 0;
    *out = strtoll(*at, &stop, 10);
    if (errno || stop == *at || *stop != end)
        return false;
    *at = stop + 1;
    return true;
}

static bool take_hex(const char **at, int digits, uint64_t *out)
{
    *out = 0;
    for (int i = 0; i < digits; i++, (*at)++) {
        const char c = **at;
        const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0)
            return false;
        *out = *out << 4 | (uint64_t)digit;
    }
    return true;
}

// A line without its newline.
static bool parse(const struct algo_cache *c, const char *line, struct entry *e)
{
    const char *at = line;
    uint64_t sum;
    for (int i = 0; i < c->key_n; i++)
        if (!take_decimal(&at, ' ', &e->key[i]))
            return false;
    if (*at++ != ':')
        return false;
    for (int i = 0; i < ALGO_WORDS; i++)
        if (*at++ != ' ' || !take_hex(&at, 16, &e->algo[i]))
            return false;
    const size_t before = (size_t)(at - line);
    return *at++ == ' ' && take_hex(&at, 8, &sum) && *at == 0 && sum == checksum(line, before);
}

// Entries that are there already stay: they are this process's choice.
static void read_lines(struct algo_cache *c, FILE *f)
{
    char line[LINE];
    bool head = false;
    while (fgets(line, sizeof line, f)) {
        struct entry e = {0};
        const size_t n = strlen(line);
        if (n == 0 || line[n - 1] != '\n')
            return; // cut short, or no file of ours
        line[n - 1] = 0;
        if (!head && strcmp(line, c->head) != 0)
            return;
        if (head && parse(c, line, &e) && !entry_of(c, e.key))
            set(c, e.key, e.algo);
        head = true;
    }
}

static void read_file(struct algo_cache *c)
{
    struct stat st;
    if (!c->path[0])
        return;
    // Not blocking: whatever lies there under that name must not hold up the process.
    const int fd = open(c->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return;
    const bool sound = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (st.st_uid == geteuid() || st.st_uid == 0) &&
                       st.st_size <= MOST_BYTES;
    FILE *f = sound ? fdopen(fd, "r") : NULL;
    if (!f) {
        close(fd);
        return;
    }
    read_lines(c, f);
    fclose(f);
}

// ---- writing

static bool write_lines(const struct algo_cache *c, FILE *f)
{
    fprintf(f, "%s\n", c->head);
    for (size_t i = 0; i < c->count; i++) {
        char line[LINE];
        int n = 0;
        for (int j = 0; j < c->key_n; j++)
            n += snprintf(line + n, sizeof line - (size_t)n, "%" PRId64 " ", c->list[i].key[j]);
        line[n++] = ':';
        for (int j = 0; j < ALGO_WORDS; j++)
            n += snprintf(line + n, sizeof line - (size_t)n, " %016" PRIx64, c->list[i].algo[j]);
        fprintf(f, "%s %08" PRIx32 "\n", line, checksum(line, (size_t)n));
    }
    return !ferror(f);
}
// 21 characters a number of the key, 17 a word of the algorithm
_Static_assert(ALGO_KEY_MAX * 21 + ALGO_WORDS * 17 + 32 < LINE, "a line has room for an entry");

void algo_cache_make_folder(const char *folder)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", folder);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    mkdir(path, 0700);
}

void algo_cache_save(struct algo_cache *c)
{
    char name[PATH_MAX + 8];
    if (!c->fresh || !c->path[0])
        return;
    c->fresh = false; // whatever comes of it: there is no second try until something is new
    read_file(c);
    algo_cache_make_folder(c->folder);
    snprintf(name, sizeof name, "%s.XXXXXX", c->path);
    const int fd = mkostemp(name, O_CLOEXEC);
    if (fd < 0)
        return;
    FILE *f = fdopen(fd, "w");
    if (!f)
        close(fd);
    bool whole = f && write_lines(c, f);
    if (f && fclose(f) != 0) // a full disk tells here, if not before
        whole = false;
    if (!whole || rename(name, c->path) != 0)
        unlink(name);
}

// ---- open and close

struct algo_cache *algo_cache_open(const char *folder, const char *library, const char *words, int key_n)
{
    if (key_n < 1 || key_n > ALGO_KEY_MAX)
        return NULL;
    struct algo_cache *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->key_n = key_n;
    const int n = snprintf(c->head, sizeof c->head, "ditfleet-algorithms 1 %d: %.*s", key_n, WORDS, words);
    for (int i = 0; i < n; i++)
        if (c->head[i] < ' ' || c->head[i] > '~')
            c->head[i] = '?';
    if (folder && strlen(folder) < sizeof c->path - 64) {
        snprintf(c->folder, sizeof c->folder, "%s", folder);
        snprintf(c->path, sizeof c->path, "%.*s/%.20s-%016" PRIx64 ".txt", (int)(sizeof c->path - 64), folder, library,
                 fnv(c->head, strlen(c->head)));
    }
    read_file(c);
    return c;
}

void algo_cache_close(struct algo_cache *c)
{
    if (!c)
        return;
    algo_cache_save(c);
    free(c->list);
    free(c);
}
