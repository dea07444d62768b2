// test_png.c: a PNG gives back its pixels and texts, and is the same file every time.
#include "worker/output/png.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <openssl/sha.h>
#include <png.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint8_t *make_pixels(uint32_t height, uint32_t width)
{
    uint8_t *rgb = malloc((size_t)height * width * 3);
    uint32_t noise = 1;
    for (uint32_t y = 0; y < height; y++)
        for (uint32_t x = 0; x < width; x++)
            for (uint32_t c = 0; c < 3; c++) {
                noise = noise * 1664525 + 1013904223;
                rgb[((size_t)y * width + x) * 3 + c] = (uint8_t)(x * (c + 1) + y * 2 + (noise >> 29));
            }
    return rgb;
}

static void check_pixels(const struct picture *p, const uint8_t *rgb, uint32_t height, uint32_t width)
{
    png_image image = {.version = PNG_IMAGE_VERSION};
    assert_true(png_image_begin_read_from_memory(&image, p->bytes, p->len));
    assert_int_equal(image.width, width);
    assert_int_equal(image.height, height);
    image.format = PNG_FORMAT_RGB;
    uint8_t *back = malloc((size_t)height * width * 3);
    assert_true(png_image_finish_read(&image, NULL, back, 0, NULL));
    assert_memory_equal(back, rgb, (size_t)height * width * 3);
    free(back);
}

struct reader {
    const uint8_t *bytes;
    size_t left;
};

static void on_read(png_structp png, png_bytep out, size_t n)
{
    struct reader *r = png_get_io_ptr(png);
    assert_true(n <= r->left);
    memcpy(out, r->bytes, n);
    r->bytes += n;
    r->left -= n;
}

static void test_pixels_and_hash(void **state)
{
    (void)state;
    static const uint32_t sizes[][2] = {{1, 1}, {1, 7}, {5, 3}, {176, 208}, {1024, 1024}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint32_t h = sizes[i][0], w = sizes[i][1];
        uint8_t *rgb = make_pixels(h, w);
        struct picture p;
        struct err e = {0};
        assert_int_equal(picture_encode(rgb, h, w, NULL, 0, &p, &e), 0);
        check_pixels(&p, rgb, h, w);
        unsigned char sum[32];
        char hex[65];
        SHA256(p.bytes, p.len, sum);
        for (int k = 0; k < 32; k++)
            snprintf(hex + (size_t)2 * k, 3, "%02x", sum[k]);
        assert_string_equal(p.sha256, hex);
        picture_free(&p);
        assert_null(p.bytes);
        free(rgb);
    }
}

static void test_same_bytes(void **state)
{
    (void)state;
    uint8_t *rgb = make_pixels(96, 64);
    const struct picture_text texts[] = {{"seed", "1"}};
    struct picture a, b, c;
    assert_int_equal(picture_encode(rgb, 96, 64, texts, 1, &a, NULL), 0);
    assert_int_equal(picture_encode(rgb, 96, 64, texts, 1, &b, NULL), 0);
    assert_int_equal(a.len, b.len);
    assert_memory_equal(a.bytes, b.bytes, a.len);
    rgb[0] ^= 1;
    assert_int_equal(picture_encode(rgb, 96, 64, texts, 1, &c, NULL), 0);
    assert_string_not_equal(a.sha256, c.sha256);
    picture_free(&a);
    picture_free(&b);
    picture_free(&c);
    free(rgb);
}

static void test_texts(void **state)
{
    (void)state;
    char *big = malloc(1 << 20);
    memset(big, 'x', 1 << 20);
    big[(1 << 20) - 1] = 0;
    const struct picture_text texts[] = {
        {"seed", "42"},
        {"Model hash", "caf\xc3\xa9 \xc3\xbf"}, // Latin-1: tEXt
        {"title", "\xe7\x8c\xab \xf0\x9f\x90\xb1"},
        {"empty", ""}, // beyond: iTXt
        {"big", big},
    };
    static const char *const expected[] = {"42", "caf\xe9 \xff", "\xe7\x8c\xab \xf0\x9f\x90\xb1", ""};
    uint8_t *rgb = make_pixels(4, 4);
    struct picture p;
    assert_int_equal(picture_encode(rgb, 4, 4, texts, 5, &p, NULL), 0);
    struct reader r = {p.bytes, p.len};
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    png_set_read_fn(png, &r, on_read);
    png_read_info(png, info);
    png_textp found;
    int n = 0;
    png_get_text(png, info, &found, &n);
    assert_int_equal(n, 5);
    for (size_t i = 0; i < 4; i++) {
        assert_string_equal(found[i].key, texts[i].key);
        assert_string_equal(found[i].text, expected[i]);
        assert_int_equal(found[i].compression, i == 2 ? PNG_ITXT_COMPRESSION_NONE : PNG_TEXT_COMPRESSION_NONE);
    }
    assert_string_equal(found[4].text, big);
    png_timep time;
    assert_false(png_get_tIME(png, info, &time));
    png_destroy_read_struct(&png, &info, NULL);
    picture_free(&p);
    free(rgb);
    free(big);
}

static void test_bad_input(void **state)
{
    (void)state;
    static const uint8_t rgb[12];
    static const struct picture_text bad[] = {
        {"k", "\xff"},
        {"k", "\xc3"},
        {"k", "\xc0\x80"},
        {"k", "\xed\xa0\x80"},
        {"k", "\xf4\x90\x80\x80"},
        {"k", "\xe7\x8c"},
        {"k", "\x80"},
        {"", "v"},
        {" k", "v"},
        {"k ", "v"},
        {"a  b", "v"},
        {"k\n", "v"},
        {"k\xc3\xa9", "v"},
        {"a key of eighty characters is one more than the format of this file allows, alas!", "v"},
    };
    struct picture p;
    struct err e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        e = (struct err){0};
        assert_int_equal(picture_encode(rgb, 2, 2, &bad[i], 1, &p, &e), ERR_INVALID);
        assert_int_equal(e.code, ERR_INVALID);
        assert_non_null(strstr(e.text, "PNG text"));
        assert_null(p.bytes);
    }
    assert_int_equal(picture_encode(rgb, 0, 2, NULL, 0, &p, &e), ERR_INVALID);
    assert_int_equal(picture_encode(rgb, 2, 1u << 31, NULL, 0, &p, &e), ERR_INVALID);
    assert_non_null(strstr(e.text, "65536"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pixels_and_hash),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_bad_input),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
