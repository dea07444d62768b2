// clip_tokenizer.c: byte-level BPE with CLIP's normalisation, in the order transformers' CLIPTokenizer works:
//
//   text -> cut out added tokens that match raw text -> NFC, runs of white space to one space, lower case
//        -> cut out added tokens that match normalised text -> words, digits, punctuation runs -> bytes -> merges
//
// Details that caused bugs: the added tokens of a model folder differ in whether they match raw or normalised text
// (tokenizer_config.json says, per token); a letter's last byte takes the suffix </w>; lower case is per character,
// with no special final sigma. Every step is O(n) or O(n log n): prompts come from strangers.
#include "worker/text/clip_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <errno.h>
#include <jansson.h>
#include <pcre2.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { CLIP_MAX_LENGTH = 77, MAX_ADDED = 256, PATH_SIZE = 4096 };

struct added {     // a token matched as a whole, before words are split
    char *text;    // as it is compared: normalised if normalized is set
    size_t length; // bytes
    int32_t id;
    bool normalized; // compared with normalised text; else with raw text
};

struct merge { // left and right ids make id; the table is open addressing, a slot with rank UINT32_MAX is free
    uint64_t pair;
    uint32_t rank; // smaller merges first
    int32_t id;
};

struct clip_tokenizer {
    int32_t byte_id[2][256]; // id of a single byte: [0] inside a word, [1] at its end (with </w>)
    struct merge *merges;    // (merge_mask + 1)
    size_t merge_mask;
    struct added added[MAX_ADDED];
    int n_added;
    int32_t bos, eos, pad, unk;
    int max_length;
    int32_t id_limit;
    pcre2_code *words;
};

// ---- merge table

static uint64_t pair_of(int32_t left, int32_t right)
{
    return ((uint64_t)(uint32_t)left << 32) | (uint32_t)right;
}

static struct merge *merge_slot(const struct clip_tokenizer *t, uint64_t pair)
{
    uint64_t h = pair * UINT64_C(0x9E3779B97F4A7C15);
    size_t i = (size_t)(h >> 20) & t->merge_mask;
    while (t->merges[i].rank != UINT32_MAX && t->merges[i].pair != pair)
        i = (i + 1) & t->merge_mask;
    return &t->merges[i];
}

static int merges_alloc(struct clip_tokenizer *t, size_t n, struct err *e)
{
    size_t slots = 16;
    while (slots < 2 * n)
        slots *= 2;
    t->merges = malloc(slots * sizeof *t->merges);
    if (t->merges == NULL)
        return err_set(e, ERR_NO_MEMORY, "no memory for %zu merges", n);
    t->merge_mask = slots - 1;
    for (size_t i = 0; i < slots; i++)
        t->merges[i].rank = UINT32_MAX;
    return 0;
}

// ---- normalisation

static bool is_space(utf8proc_int32_t c) // Unicode's White_Space
{
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

static int combining_class(utf8proc_int32_t c)
{
    return utf8proc_get_property(c)->combining_class;
}

// Stable counting sort of one run of combining marks by class. utf8proc's own reordering swaps neighbours, which a
// long hostile run makes quadratic.
static void sort_marks(utf8proc_int32_t *run, size_t n, utf8proc_int32_t *scratch)
{
    size_t start[257] = {0};
    for (size_t i = 0; i < n; i++)
        start[combining_class(run[i]) + 1]++;
    for (int c = 1; c <= 256; c++)
        start[c] += start[c - 1];
    for (size_t i = 0; i < n; i++)
        scratch[start[combining_class(run[i])]++] = run[i];
    memcpy(run, scratch, n * sizeof *run);
}

static void reorder_marks(utf8proc_int32_t *c, size_t n, utf8proc_int32_t *scratch)
{
    for (size_t i = 0; i < n; i++) {
        size_t begin = i;
        bool sorted = true;
        for (; i < n && combining_class(c[i]) != 0; i++)
            sorted = sorted && (i == begin || combining_class(c[i - 1]) <= combining_class(c[i]));
        if (!sorted)
            sort_marks(c + begin, i - begin, scratch);
    }
}

// points: (4 * length), since no code point decomposes to more than 4. Returns how many were written, all valid.
static size_t decompose(const char *text, size_t length, utf8proc_int32_t *points)
{
    size_t n = 0;
    for (size_t i = 0; i < length;) {
        utf8proc_int32_t c;
        i += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(length - i), &c);
        n += (size_t)utf8proc_decompose_char(c, points + n, 4, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, NULL);
    }
    return n;
}

// NFC, runs of white space to one space, lower case. text is valid UTF-8; *out is the caller's to free.
static int normalise(const char *text, size_t length, char **out, size_t *out_length, struct err *e)
{
    size_t room = 4 * length + 4;
    utf8proc_int32_t *points = malloc(2 * room * sizeof *points);
    char *result = malloc(room + 1);
    if (points == NULL || result == NULL) {
        free(points);
        free(result);
        return err_set(e, ERR_NO_MEMORY, "no memory to normalise a text of %zu bytes", length);
    }
    size_t n = decompose(text, length, points);
    reorder_marks(points, n, points + room);
    n = (size_t)utf8proc_normalize_utf32(points, (utf8proc_ssize_t)n, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    utf8proc_uint8_t *end = (utf8proc_uint8_t *)result;
    for (size_t i = 0; i < n; i++) {
        if (is_space(points[i])) {
            if (i == 0 || !is_space(points[i - 1]))
                *end++ = ' ';
        } else if (points[i] == 0x130) { // the one letter whose lower case is two code points
            end += utf8proc_encode_char('i', end);
            end += utf8proc_encode_char(0x307, end);
        } else {
            end += utf8proc_encode_char(utf8proc_tolower(points[i]), end);
        }
    }
    free(points);
    *out = result;
    *out_length = (size_t)((char *)end - result);
    return 0;
}

// ---- encoding

struct symbol { // a doubly linked list through an array, in text order
    int32_t id; // -1: merged into its left neighbour
    int32_t previous, next;
};

struct candidate { // a merge that was possible when it was pushed
    uint32_t rank;
    int32_t at; // the left symbol
    int32_t id; // what the pair becomes
};

struct encoder {
    const struct clip_tokenizer *t;
    struct err *e;
    int32_t *ids; // (max_length)
    int max_length;
    int64_t count;
    pcre2_match_data *match;
    struct symbol *symbols; // (room)
    struct candidate *heap; // (3 * room): one a pair, and two more a merge
    size_t room, heap_length;
};

static void emit(struct encoder *x, int32_t id)
{
    if (x->count < x->max_length)
        x->ids[x->count] = id;
    x->count++;
}

static bool before(struct candidate a, struct candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void heap_push(struct encoder *x, struct candidate c)
{
    size_t i = x->heap_length++;
    for (; i > 0 && before(c, x->heap[(i - 1) / 2]); i = (i - 1) / 2)
        x->heap[i] = x->heap[(i - 1) / 2];
    x->heap[i] = c;
}

static struct candidate heap_pop(struct encoder *x)
{
    struct candidate top = x->heap[0], last = x->heap[--x->heap_length];
    size_t i = 0;
    for (size_t child = 1; child < x->heap_length; child = 2 * i + 1) {
        if (child + 1 < x->heap_length && before(x->heap[child + 1], x->heap[child]))
            child++;
        if (!before(x->heap[child], last))
            break;
        x->heap[i] = x->heap[child];
        i = child;
    }
    x->heap[i] = last;
    return top;
}

static const struct merge *merge_at(const struct encoder *x, int32_t at)
{
    const struct symbol *s = &x->symbols[at];
    if (s->id < 0 || s->next < 0)
        return NULL;
    const struct merge *m = merge_slot(x->t, pair_of(s->id, x->symbols[s->next].id));
    return m->rank == UINT32_MAX ? NULL : m;
}

static void consider(struct encoder *x, int32_t at)
{
    const struct merge *m = at < 0 ? NULL : merge_at(x, at);
    if (m != NULL)
        heap_push(x, (struct candidate){m->rank, at, m->id});
}

static int make_room(struct encoder *x, size_t n)
{
    if (n <= x->room)
        return 0;
    size_t room = n < 64 ? 64 : n;
    free(x->symbols);
    free(x->heap);
    x->symbols = malloc(room * sizeof *x->symbols);
    x->heap = malloc(3 * room * sizeof *x->heap);
    x->room = x->symbols == NULL || x->heap == NULL ? 0 : room;
    return x->room != 0 ? 0 : err_set(x->e, ERR_NO_MEMORY, "no memory for a word of %zu bytes", n);
}

// One word (at least a byte) to tokens: the merge of lowest rank first, the leftmost of equals.
static int encode_word(struct encoder *x, const char *word, size_t length)
{
    TRY(make_room(x, length));
    int32_t n = (int32_t)length;
    for (int32_t i = 0; i < n; i++)
        x->symbols[i] =
            (struct symbol){x->t->byte_id[i == n - 1][(unsigned char)word[i]], i - 1, i + 1 < n ? i + 1 : -1};
    x->heap_length = 0;
    for (int32_t i = 0; i < n; i++)
        consider(x, i);
    while (x->heap_length > 0) {
        struct candidate c = heap_pop(x);
        const struct merge *m = merge_at(x, c.at);
        if (m == NULL || m->id != c.id) // its symbols have changed since
            continue;
        struct symbol *left = &x->symbols[c.at], *right = &x->symbols[left->next];
        left->id = c.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            x->symbols[left->next].previous = c.at;
        consider(x, left->previous);
        consider(x, c.at);
    }
    for (int32_t i = 0; i >= 0; i = x->symbols[i].next)
        emit(x, x->symbols[i].id);
    return 0;
}

// Normalised text without added tokens.
static int encode_words(struct encoder *x, const char *text, size_t length)
{
    for (size_t at = 0; at < length;) {
        int found = pcre2_match(x->t->words, (PCRE2_SPTR)text, length, at, PCRE2_NO_UTF_CHECK, x->match, NULL);
        if (found == PCRE2_ERROR_NOMATCH)
            return 0;
        if (found < 0)
            return err_set(x->e, ERR_INTERNAL, "splitting a text into words failed: PCRE2 error %d", found);
        const size_t *ends = pcre2_get_ovector_pointer(x->match);
        const char *word = text + ends[0];
        size_t n = ends[1] - ends[0];
        at = ends[1];
        if (n > 4 && (word[2] == 's' || word[2] == 'e') && word[0] == '<') { // <|name|> that is no added token: 3 words
            TRY(encode_word(x, word, 2));
            TRY(encode_word(x, word + 2, n - 4));
            TRY(encode_word(x, word + n - 2, 2));
        } else {
            TRY(encode_word(x, word, n));
        }
    }
    return 0;
}

// The longest added token that text starts with.
static const struct added *added_at(const struct clip_tokenizer *t, bool normalized, const char *text, size_t length)
{
    const struct added *best = NULL;
    for (const struct added *a = t->added; a < t->added + t->n_added; a++)
        if (a->normalized == normalized && a->length <= length && a->text[0] == text[0] &&
            memcmp(a->text, text, a->length) == 0 && (best == NULL || a->length > best->length))
            best = a;
    return best;
}

static int encode_raw_piece(struct encoder *x, const char *text, size_t length);

// Cuts text at its added tokens; what lies between goes on to the next stage.
static int cut_added(struct encoder *x, bool normalized, const char *text, size_t length)
{
    int (*next)(struct encoder *, const char *, size_t) = normalized ? encode_words : encode_raw_piece;
    size_t begin = 0;
    for (size_t i = 0; i < length;) {
        const struct added *a = added_at(x->t, normalized, text + i, length - i);
        if (a == NULL) {
            i++;
            continue;
        }
        TRY(next(x, text + begin, i - begin));
        emit(x, a->id);
        i += a->length;
        begin = i;
    }
    return next(x, text + begin, length - begin);
}

static int encode_raw_piece(struct encoder *x, const char *text, size_t length)
{
    if (length == 0)
        return 0;
    char *plain = NULL;
    size_t plain_length = 0;
    TRY(normalise(text, length, &plain, &plain_length, x->e));
    int rc = cut_added(x, true, plain, plain_length);
    free(plain);
    return rc;
}

static int check_utf8(const char *text, size_t length, struct err *e)
{
    for (size_t i = 0; i < length;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(length - i), &c);
        if (n <= 0)
            return err_set(e, ERR_INVALID, "the text is not valid UTF-8 at byte %zu", i);
        i += (size_t)n;
    }
    return 0;
}

int clip_tokenizer_encode(const struct clip_tokenizer *t, const char *text, size_t length, int max_length, int32_t *ids,
                          int64_t *count, struct err *e)
{
    enum { LONGEST = 1 << 24 };
    if (max_length < 2)
        return err_set(e, ERR_INVALID, "a CLIP prompt has at least 2 tokens, not %d", max_length);
    if (length > LONGEST)
        return err_set(e, ERR_INVALID, "the text has %zu bytes; up to %d are allowed", length, (int)LONGEST);
    TRY(check_utf8(text, length, e));
    struct encoder x = {.t = t, .e = e, .ids = ids, .max_length = max_length};
    x.match = pcre2_match_data_create(1, NULL);
    if (x.match == NULL)
        return err_set(e, ERR_NO_MEMORY, "no memory to tokenize");
    emit(&x, t->bos);
    int rc = cut_added(&x, false, text, length);
    if (x.count >= max_length)
        ids[max_length - 1] = t->eos;
    emit(&x, t->eos);
    for (int64_t i = x.count; i < max_length; i++)
        ids[i] = t->pad;
    *count = x.count;
    pcre2_match_data_free(x.match);
    free(x.symbols);
    free(x.heap);
    return rc;
}

// ---- loading

static int load_json(const char *dir, const char *name, bool required, json_t **out, struct err *e)
{
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    *out = NULL;
    FILE *f = fopen(path, "rb");
    if (f == NULL && errno == ENOENT && !required)
        return 0;
    if (f == NULL)
        return err_set(e, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO,
                       "%s: %s; a CLIP tokenizer folder holds vocab.json and merges.txt", path, strerror(errno));
    json_error_t why;
    *out = json_loadf(f, 0, &why);
    fclose(f);
    if (!json_is_object(*out)) {
        bool parsed = *out != NULL;
        json_decref(*out);
        *out = NULL;
        return err_set(e, ERR_CORRUPT, "%s: line %d: %s", path, parsed ? 1 : why.line,
                       parsed ? "not a JSON object" : why.text);
    }
    return 0;
}

static int32_t vocab_id(const json_t *vocab, const char *token) // -1: not there
{
    const json_t *id = json_object_get(vocab, token);
    return id == NULL ? -1 : (int32_t)json_integer_value(id);
}

static int read_vocab(struct clip_tokenizer *t, json_t *vocab, struct err *e)
{
    const char *token;
    json_t *id;
    json_object_foreach(vocab, token, id)
    {
        json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value >= INT32_MAX)
            return err_set(e, ERR_CORRUPT, "vocab.json: token \"%.40s\" has no id from 0 to 2147483646", token);
        if (value >= t->id_limit)
            t->id_limit = (int32_t)value + 1;
    }
    return 0;
}

// The vocabulary spells a byte as one printable character: itself where it is printable Latin-1, else the next from
// U+0100 on.
static void read_bytes(struct clip_tokenizer *t, const json_t *vocab)
{
    int other = 0x100;
    for (int b = 0; b < 256; b++) {
        bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
        char token[16];
        utf8proc_ssize_t n = utf8proc_encode_char(printable ? b : other++, (utf8proc_uint8_t *)token);
        for (int end = 0; end < 2; end++) {
            snprintf(token + n, sizeof token - (size_t)n, "%s", end ? "</w>" : "");
            int32_t id = vocab_id(vocab, token);
            t->byte_id[end][b] = id < 0 ? t->unk : id;
        }
    }
}

// One line "left right" of merges.txt; both and their concatenation are in the vocabulary.
static int read_merge(struct clip_tokenizer *t, const json_t *vocab, char *line, int number, struct err *e)
{
    char *right = strchr(line, ' ');
    if (right == NULL || right == line || right[1] == '\0' || strchr(right + 1, ' ') != NULL)
        return err_set(e, ERR_CORRUPT, "merges.txt: line %d is not two tokens with a space between", number);
    *right++ = '\0';
    int32_t left_id = vocab_id(vocab, line), right_id = vocab_id(vocab, right);
    memmove(right - 1, right, strlen(right) + 1); // line is now the merged token
    int32_t id = vocab_id(vocab, line);
    if (left_id < 0 || right_id < 0 || id < 0)
        return err_set(e, ERR_CORRUPT, "merges.txt: line %d names a token that vocab.json does not have", number);
    *merge_slot(t, pair_of(left_id, right_id)) = (struct merge){pair_of(left_id, right_id), (uint32_t)number, id};
    return 0;
}

static int read_merges(struct clip_tokenizer *t, const char *dir, const json_t *vocab, struct err *e)
{
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/merges.txt", dir);
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        return err_set(e, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO,
                       "%s: %s; a CLIP tokenizer folder holds vocab.json and merges.txt", path, strerror(errno));
    size_t lines = 1;
    for (int c; (c = getc(f)) != EOF;)
        lines += c == '\n';
    rewind(f);
    int rc = merges_alloc(t, lines, e);
    char *line = NULL;
    size_t size = 0;
    ssize_t got;
    for (int number = 1; rc == 0 && (got = getline(&line, &size, f)) >= 0; number++) {
        while (got > 0 && (line[got - 1] == '\n' || line[got - 1] == '\r'))
            line[--got] = '\0';
        if (got > 0 && strncmp(line, "#version", 8) != 0)
            rc = read_merge(t, vocab, line, number, e);
    }
    if (rc == 0 && ferror(f))
        rc = err_set(e, ERR_IO, "%s: cannot be read", path);
    free(line);
    fclose(f);
    return rc;
}

// Adds or replaces an added token.
static int put_added(struct clip_tokenizer *t, const json_t *vocab, const char *text, bool normalized, struct err *e)
{
    int32_t id = vocab_id(vocab, text);
    if (id < 0 || *text == '\0')
        return err_set(e, ERR_CORRUPT, "the special token \"%.40s\" is not in vocab.json", text);
    struct added *a = t->added;
    while (a < t->added + t->n_added && a->id != id)
        a++;
    if (a == t->added + MAX_ADDED)
        return err_set(e, ERR_UNSUPPORTED, "more than %d added tokens", (int)MAX_ADDED);
    if (a < t->added + t->n_added)
        free(a->text);
    else
        t->n_added++;
    *a = (struct added){.id = id, .normalized = normalized, .length = strlen(text)};
    if (normalized)
        return normalise(text, a->length, &a->text, &a->length, e);
    a->text = strdup(text);
    return a->text != NULL ? 0 : err_set(e, ERR_NO_MEMORY, "no memory for the added tokens");
}

// An entry is a string, or an object as transformers saves an AddedToken; *text borrows from it.
static int parse_added(const json_t *entry, const char **text, bool *normalized, struct err *e)
{
    *text = json_string_value(json_is_object(entry) ? json_object_get(entry, "content") : entry);
    *normalized = json_is_true(json_object_get(entry, "normalized")); // of a string: false
    if (*text == NULL)
        return err_set(e, ERR_CORRUPT, "a special token is neither a string nor an object with \"content\"");
    static const char *const matching[] = {"lstrip", "rstrip", "single_word"};
    for (size_t i = 0; i < sizeof matching / sizeof matching[0]; i++)
        if (json_is_true(json_object_get(entry, matching[i])))
            return err_set(e, ERR_UNSUPPORTED, "the special token \"%.40s\" sets %s, which is not supported", *text,
                           matching[i]);
    return 0;
}

static int read_decoder(struct clip_tokenizer *t, json_t *decoder, const json_t *vocab, struct err *e)
{
    const char *key, *text;
    json_t *entry;
    bool normalized;
    json_object_foreach(decoder, key, entry)
    {
        TRY(parse_added(entry, &text, &normalized, e));
        TRY(put_added(t, vocab, text, normalized, e));
    }
    return 0;
}

// As transformers decides: tokens listed in the config's added_tokens_decoder count as listed there; else
// special_tokens_map.json goes before tokenizer_config.json, and of several roles of one token the last counts.
static int read_special(struct clip_tokenizer *t, const json_t *config, const json_t *map, const json_t *vocab,
                        struct err *e)
{
    const struct {
        const char *role, *usual;
        int32_t *id;
    } roles[] = {{"bos_token", "<|startoftext|>", &t->bos},
                 {"eos_token", "<|endoftext|>", &t->eos},
                 {"unk_token", "<|endoftext|>", &t->unk},
                 {"pad_token", "<|endoftext|>", &t->pad}};
    json_t *decoder = json_object_get(config, "added_tokens_decoder");
    if (decoder != NULL)
        TRY(read_decoder(t, decoder, vocab, e));
    for (size_t i = 0; i < sizeof roles / sizeof roles[0]; i++) {
        const json_t *entry = decoder == NULL ? json_object_get(map, roles[i].role) : NULL;
        if (entry == NULL)
            entry = json_object_get(config, roles[i].role);
        const char *text = roles[i].usual;
        bool normalized = false, listed = false;
        if (entry != NULL && !json_is_null(entry))
            TRY(parse_added(entry, &text, &normalized, e));
        *roles[i].id = vocab_id(vocab, text);
        for (int k = 0; k < t->n_added; k++)
            listed = listed || t->added[k].id == *roles[i].id;
        if (decoder == NULL || !listed)
            TRY(put_added(t, vocab, text, normalized, e));
    }
    return 0;
}

static int compile_words(struct clip_tokenizer *t, struct err *e)
{
    static const char pattern[] = "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|\\p{L}++|\\p{N}|"
                                  "[^ \\p{L}\\p{N}]++"; // the space is the only white space left by then
    int code;
    size_t offset;
    t->words = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF, &code, &offset, NULL);
    return t->words != NULL ? 0 : err_set(e, ERR_INTERNAL, "PCRE2 error %d in the word pattern at %zu", code, offset);
}

static int load(struct clip_tokenizer *t, const char *dir, struct err *e)
{
    json_t *vocab = NULL, *config = NULL, *map = NULL;
    int rc = load_json(dir, "vocab.json", true, &vocab, e);
    if (rc == 0)
        rc = load_json(dir, "tokenizer_config.json", false, &config, e);
    if (rc == 0)
        rc = load_json(dir, "special_tokens_map.json", false, &map, e);
    if (rc == 0 && (rc = read_vocab(t, vocab, e)) == 0 && (rc = read_special(t, config, map, vocab, e)) == 0) {
        read_bytes(t, vocab);
        rc = read_merges(t, dir, vocab, e);
    }
    json_int_t asked = json_integer_value(json_object_get(config, "model_max_length"));
    t->max_length = asked >= 2 && asked <= 1 << 20 ? (int)asked : CLIP_MAX_LENGTH;
    json_decref(vocab);
    json_decref(config);
    json_decref(map);
    return rc != 0 ? rc : compile_words(t, e);
}

int clip_tokenizer_load(const char *dir, struct clip_tokenizer **out, struct err *e)
{
    struct clip_tokenizer *t = calloc(1, sizeof *t);
    if (t == NULL)
        return err_set(e, ERR_NO_MEMORY, "no memory for the CLIP tokenizer");
    int rc = load(t, dir, e);
    if (rc != 0) {
        clip_tokenizer_free(t);
        return err_context(e, "CLIP tokenizer %s", dir);
    }
    *out = t;
    return 0;
}

void clip_tokenizer_free(struct clip_tokenizer *t)
{
    if (t == NULL)
        return;
    for (int i = 0; i < t->n_added; i++)
        free(t->added[i].text);
    free(t->merges);
    pcre2_code_free(t->words);
    free(t);
}

int clip_tokenizer_max_length(const struct clip_tokenizer *t)
{
    return t->max_length;
}

int32_t clip_tokenizer_id_limit(const struct clip_tokenizer *t)
{
    return t->id_limit;
}
