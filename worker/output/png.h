// png.h: a finished picture as PNG bytes. The bytes are a function of pixels and text alone (no time, no host, no
// thread count), so that a second upload of the same job writes the same file.
#ifndef DITFLEET_OUTPUT_PNG_H
#define DITFLEET_OUTPUT_PNG_H

#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

// One text chunk: tEXt when the value fits in Latin-1, else iTXt.
struct picture_text {
    const char *key;   // 1 to 79 printable ASCII characters, no space at either end
    const char *value; // UTF-8, any length
};

struct picture {
    uint8_t *bytes; // (len) a complete PNG file, owned
    size_t len;
    char sha256[65]; // of bytes, lower-case hex
};

// rgb: (height, width, 3) bytes, rows top to bottom. Chunks of text come in the order given, before the pixels.
// Fails with ERR_INVALID (sizes, a bad key, invalid UTF-8), ERR_NO_MEMORY, ERR_INTERNAL; *out is then empty.
// The caller frees *out with picture_free.
int picture_encode(const uint8_t *rgb, uint32_t height, uint32_t width, const struct picture_text *texts,
                   size_t n_texts, struct picture *out, struct err *e);
void picture_free(struct picture *p); // NULL and an empty picture are fine

#endif
