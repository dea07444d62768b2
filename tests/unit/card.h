// card.h: a device with memory of its own, which tests can look into: the CPU's, made to copy weights, to count them,
// and to say how much memory there is. What is given back becomes NaN. Weights asked for in E4M3 stay as they are, and
// what is placed twice is the same both times. Include <cmocka.h> first.
#ifndef DITFLEET_TESTS_CARD_H
#define DITFLEET_TESTS_CARD_H

#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

enum { CARD_FRONT = 256 };
static struct {
    int64_t placed, largest; // bytes of weights now, and at most
    int n;                   // of weights now
    int64_t taken;           // bytes of memory that was asked for
    size_t total;            // memory of the device
    bool full;               // no weight can be placed any more
    bool second;             // as take_second has it
    int used[2];             // layers placed twice that were called: by their first numbers, and by the second
} card;

static inline size_t bytes_of(struct tensor t)
{
    return (tensor_bytes(t) + 511) & ~(size_t)511;
}

static inline float number(struct tensor t, int64_t i)
{
    if (t.dtype == DT_F32)
        return ((float *)t.data)[i];
    return t.dtype == DT_BF16 ? bf16_to_f32(((uint16_t *)t.data)[i]) : f16_to_f32(((uint16_t *)t.data)[i]);
}

// Room for a tensor on the card.
static inline int card_take(struct tensor *t, struct err *err)
{
    t->data = card.full ? NULL : malloc(tensor_bytes(*t) + 1);
    if (!t->data) {
        err_set(err, ERR_NO_MEMORY, "the card is full");
        return ERR_NO_MEMORY;
    }
    card.n++;
    card.placed += (int64_t)bytes_of(*t);
    card.largest = card.placed > card.largest ? card.placed : card.largest;
    return 0;
}

static inline int card_place(struct device *d, struct tensor host, struct tensor *out, struct err *err)
{
    (void)d;
    struct tensor t = host;
    t.dtype = host.dims > 1 ? DT_F32 : host.dtype;
    TRY(card_take(&t, err));
    for (int64_t i = 0; host.dims > 1 && i < tensor_count(t); i++)
        ((float *)t.data)[i] = number(host, i);
    if (host.dims == 1)
        memcpy(t.data, host.data, tensor_bytes(host));
    *out = t;
    return 0;
}

static inline int card_place_linear(struct device *d, struct linear *w, enum dtype type, bool twice, struct err *err)
{
    (void)d;
    struct linear one = {.parts = 1, .n = w->n, .k = w->k};
    assert_true(type == DT_F32 || type == DT_E4M3);
    one.w[0] = tensor_2d(NULL, DT_F32, w->n, w->k);
    TRY(card_take(&one.w[0], err));
    if (!tensor_none(w->b[0])) {
        one.b[0] = tensor_1d(NULL, DT_F32, w->n);
        TRY(card_take(&one.b[0], err));
    }
    float *weight = one.w[0].data, *bias = one.b[0].data;
    for (int p = 0; p < w->parts; p++) {
        for (int64_t i = 0; i < tensor_count(w->w[p]); i++)
            *weight++ = number(w->w[p], i);
        for (int64_t i = 0; bias && i < w->w[p].n[0]; i++)
            *bias++ = number(w->b[p], i);
    }
    if (twice && type == DT_E4M3) { // remembered as bytes
        struct tensor again = tensor_2d(NULL, DT_U8, w->n, w->k), whole = one.w[0];
        TRY(card_take(&again, err));
        again.data = realloc(again.data, tensor_bytes(whole));
        assert_non_null(again.data);
        memcpy(again.data, whole.data, tensor_bytes(whole));
        one.second = (char *)again.data - (char *)whole.data;
    }
    *w = one;
    return 0;
}

static inline void card_take_second(struct device *d, bool second)
{
    (void)d;
    card.second = second;
}

static inline void card_linear(struct device *d, struct tensor y, struct tensor x, const struct linear *w, enum act act)
{
    struct linear now = *w;
    if (w->second) {
        card.used[card.second]++;
        now.w[0].data = (char *)now.w[0].data + (card.second ? w->second : 0);
    }
    kernels_cpu.linear(d, y, x, &now, act);
}

static inline void card_displace(struct device *d, struct tensor placed)
{
    (void)d;
    card.n--;
    card.placed -= (int64_t)bytes_of(placed);
    memset(placed.data, 0xff, tensor_bytes(placed)); // NaN: whoever still reads it is seen
    free(placed.data);
}

static inline void card_memory(struct device *d, size_t *available, size_t *total)
{
    (void)d;
    *available = card.total - (size_t)(card.placed + card.taken);
    *total = card.total;
}

// Memory has its size in front of it.
static inline int card_alloc(struct device *d, size_t bytes, void **out, struct err *err)
{
    (void)d;
    const size_t size = CARD_FRONT + (bytes + CARD_FRONT - 1) / CARD_FRONT * CARD_FRONT;
    char *front = aligned_alloc(CARD_FRONT, size);
    if (!front)
        return err_set(err, ERR_NO_MEMORY, "the card is full");
    memcpy(front, &size, sizeof size);
    memset(front + CARD_FRONT, 0xff, size - CARD_FRONT); // NaN
    card.taken += (int64_t)(size - CARD_FRONT);
    *out = front + CARD_FRONT;
    return 0;
}

static inline void card_free(struct device *d, void *p)
{
    (void)d;
    size_t size;
    if (!p)
        return;
    memcpy(&size, (char *)p - CARD_FRONT, sizeof size);
    card.taken -= (int64_t)(size - CARD_FRONT);
    free((char *)p - CARD_FRONT);
}

static inline struct kernels card_kernels(void)
{
    struct kernels k = kernels_cpu;
    k.name = "card";
    k.place = card_place;
    k.place_linear = card_place_linear;
    k.take_second = card_take_second;
    k.linear = card_linear;
    k.displace = card_displace;
    k.memory = card_memory;
    k.alloc = card_alloc;
    k.free = card_free;
    return k;
}

#endif
