/* Feeds mutated records to json_rows.c; built with sanitizers, which end the program at the first wrong access.
 * Every batch lies in a block of exactly its size. Prints how many rows were taken. */
#include "../../kframe/batch/json_rows.c"
#include <stdio.h>

enum { TEXTS_MAX = 4, SIZE_MAX_ = 400, MUTATIONS_MAX = 4 };

static const char *const SEEDS[] = {
    "{\"a\":1,\"b\":\"x\\u00e9\\ud83d\\ude00\",\"c\":-1.5e3,\"d\":true,\"e\":\"2024-02-29T10:00:00.123456+02:00\","
    "\"f\":\"2024-02-29\",\"g\":\"12.50\",\"h\":{\"x\":[1,2,{\"y\":null}]}}",
    "{ \"g\" : 123456789012.25 , \"f\":null,\"a\":123456789012345678,\"c\":0.30000000000000004441}",
    "{\"h\":[[[[[[[[]]]]]]]],\"e\":1700000000000,\"b\":\"a long text without any escape in it\"}",
    "{\"i\":[1,null,2.5],\"j\":{\"k\":[\"x\",null],\"l\":\"y\"},\"m\":{\"n\":[1,{\"o\": 0.5}]},\"i2\":[[\"z\"],[]]}",
    "{}",
};
static const char ODD[] = "\"\\{}[],:0123456789.eE+-tfnuZT \n\x01\x7f\xc3\xa9";
static uint64_t state = 88172645463325252u;

static uint32_t below(uint32_t n) { /* xorshift, the same in every run */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16) % n;
}

static int64_t mutated(uint8_t *text) {
    const char *seed = SEEDS[below(sizeof SEEDS / sizeof *SEEDS)];
    int64_t size = (int64_t)strlen(seed);
    memcpy(text, seed, size);
    for (uint32_t left = below(MUTATIONS_MAX); left && size; left--) {
        int64_t at = below((uint32_t)size);
        uint8_t odd = (uint8_t)ODD[below(sizeof ODD - 1)];
        switch (below(4)) {
        case 0: text[at] = odd; break;
        case 1: memmove(text + at, text + at + 1, size-- - at - 1); break;
        case 2: memmove(text + at + 1, text + at, size++ - at), text[at] = odd; break;
        default: size = at;
        }
    }
    return size;
}

int main(int count, char **arguments) {
    column_t number = {.name = "", .kind = FLOAT, .width = 8}, word = {.name = "", .kind = TEXT};
    column_t words = {.name = "", .kind = LIST, .members = &word, .count = 1};
    column_t others[] = {
        {.name = "k", .name_size = 1, .kind = LIST, .members = &(column_t){.name = "", .kind = TEXT}, .count = 1, .next = 1},
        {.name = "l", .name_size = 1, .kind = TEXT},
    };
    column_t columns[] = {
        {.name = "a", .kind = INT, .width = 8, .low = INT64_MIN, .high = INT64_MAX},
        {.name = "b", .kind = TEXT},
        {.name = "c", .kind = FLOAT, .width = 8},
        {.name = "d", .kind = BOOL, .width = 1},
        {.name = "e", .kind = TIMESTAMP, .width = 8, .low = INT64_MIN, .high = INT64_MAX, .scale = 6, .zone = 1},
        {.name = "f", .kind = DATE, .width = 4},
        {.name = "g", .kind = DECIMAL, .width = 16, .digits = 18, .scale = 4},
        {.name = "i", .kind = LIST, .members = &number, .count = 1},
        {.name = "j", .kind = STRUCT, .members = others, .count = 2},
        {.name = "m", .kind = JSON},
        {.name = "i2", .kind = LIST, .members = &words, .count = 1},
    };
    int32_t n = sizeof columns / sizeof *columns;
    for (int32_t i = 0; i < n; i++) {
        columns[i].name_size = (int32_t)strlen(columns[i].name);
        columns[i].next = (i + 1) % n;
    }
    column_t whole = {.name = "", .kind = STRUCT, .members = columns, .count = n};
    int64_t rows = 0;
    for (long batch = 0, batches = count > 1 ? atol(arguments[1]) : 0; batch < batches; batch++) {
        uint8_t text[SIZE_MAX_], taken[TEXTS_MAX], *data = NULL;
        int32_t texts = (int32_t)below(TEXTS_MAX) + 1, bounds[TEXTS_MAX + 1] = {0};
        for (int32_t i = 0; i < texts; i++) {
            bounds[i + 1] = bounds[i] + (int32_t)mutated(text);
            uint8_t *more = malloc(bounds[i + 1] + (bounds[i + 1] == 0));
            if (data) memcpy(more, data, bounds[i]), free(data);
            memcpy(more + bounds[i], text, bounds[i + 1] - bounds[i]);
            data = more;
        }
        rows += json_rows(&whole, data, bounds, texts, taken);
        free(data);
    }
    json_free(&whole);
    printf("%ld\n", (long)rows);
    return 0;
}
