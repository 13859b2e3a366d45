/* Takes the records of librdkafka's consumer apart into columns.
 *
 * librdkafka comes with the confluent-kafka wheel. Its functions are handed over as pointers, so that nothing
 * is linked and no header is needed; message_t is its public rd_kafka_message_t.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CONSUMED_MAX = 5120 };
static const int64_t DATA_MAX = 1 << 30; /* Arrow's offsets are 32 bits wide */

typedef struct {
    int32_t error;
    void *topic;
    int32_t partition;
    void *value;
    size_t value_size;
    void *key;
    size_t key_size;
    int64_t offset;
    void *of_client;
} message_t;

typedef struct {
    int64_t (*consume)(void *queue, int timeout_ms, message_t **messages, size_t size);
    int64_t (*timestamp)(const message_t *, int *type);
    int32_t (*leader_epoch)(const message_t *);
    void (*destroy)(message_t *);
} client_t;

typedef struct {
    uint8_t *data;
    int64_t capacity;
    int32_t *ends; /* where each row's bytes end */
    uint8_t *valid;
    int64_t nulls;
} bytes_t;

typedef struct {
    client_t client;
    void *queue;
    int64_t rows, rows_max;
    void **topics;
    int32_t *partitions, *leader_epochs;
    int64_t *offsets, *timestamps;
    bytes_t keys, values;
    message_t *failed; /* stands between the rows so far and the next ones */
    message_t *consumed[CONSUMED_MAX];
    int64_t at, count;
} drain_t;

static int bytes_new(bytes_t *column, int64_t rows_max) {
    column->ends = malloc((rows_max + 1) * sizeof *column->ends);
    column->valid = malloc(rows_max);
    return column->ends && column->valid;
}

static int64_t bytes_size(const bytes_t *column, int64_t rows) { return rows ? column->ends[rows - 1] : 0; }

static int bytes_add(bytes_t *column, int64_t row, const void *data, size_t size) {
    int64_t begin = bytes_size(column, row), end = begin + (int64_t)size;
    if (end > column->capacity) {
        int64_t capacity = end + end / 2 + 4096;
        uint8_t *grown = realloc(column->data, capacity);
        if (!grown) return 0;
        column->data = grown;
        column->capacity = capacity;
    }
    if (size) memcpy(column->data + begin, data, size);
    column->ends[row] = (int32_t)end;
    column->valid[row] = data != NULL;
    column->nulls += data == NULL;
    return 1;
}

drain_t *drain_new(const client_t *client, void *queue, int64_t rows_max) {
    drain_t *drain = calloc(1, sizeof *drain);
    if (!drain) return NULL;
    drain->client = *client;
    drain->queue = queue;
    drain->rows_max = rows_max;
    drain->topics = malloc(rows_max * sizeof *drain->topics);
    drain->partitions = malloc(rows_max * sizeof *drain->partitions);
    drain->leader_epochs = malloc(rows_max * sizeof *drain->leader_epochs);
    drain->offsets = malloc(rows_max * sizeof *drain->offsets);
    drain->timestamps = malloc(rows_max * sizeof *drain->timestamps);
    int whole = drain->topics && drain->partitions && drain->leader_epochs && drain->offsets && drain->timestamps;
    return whole && bytes_new(&drain->keys, rows_max) && bytes_new(&drain->values, rows_max) ? drain : NULL;
}

/* Take up to `rows` records, waiting for the first. Stops behind one that is an error, which `failed` then
 * holds until `drain_go_on`. Returns how many were taken, or -1: out of memory, the record is still there. */
int64_t drain_take(drain_t *drain, int64_t rows, int timeout_ms) {
    int64_t before = drain->rows, room = drain->rows_max - before;
    if (rows > room) rows = room;
    if (rows > CONSUMED_MAX) rows = CONSUMED_MAX;
    if (drain->failed || rows <= 0) return 0;
    if (drain->at == drain->count) {
        drain->at = 0;
        drain->count = drain->client.consume(drain->queue, timeout_ms, drain->consumed, rows);
        if (drain->count < 0) drain->count = 0;
    }
    for (; drain->at < drain->count && drain->rows - before < rows; drain->at++) {
        message_t *m = drain->consumed[drain->at];
        int64_t row = drain->rows;
        if (m->error) {
            drain->failed = m;
            drain->at++;
            break;
        }
        if (bytes_size(&drain->values, row) + (int64_t)m->value_size > DATA_MAX && row) break;
        if (bytes_size(&drain->keys, row) + (int64_t)m->key_size > DATA_MAX && row) break;
        if (!bytes_add(&drain->keys, row, m->key, m->key_size)) return -1;
        if (!bytes_add(&drain->values, row, m->value, m->value_size)) return -1;
        int type;
        drain->topics[row] = m->topic;
        drain->partitions[row] = m->partition;
        drain->offsets[row] = m->offset;
        drain->timestamps[row] = drain->client.timestamp(m, &type);
        drain->leader_epochs[row] = drain->client.leader_epoch(m);
        drain->client.destroy(m);
        drain->rows++;
    }
    return drain->rows - before;
}

/* Forget the error that `failed` holds. */
void drain_go_on(drain_t *drain) {
    drain->client.destroy(drain->failed);
    drain->failed = NULL;
}

/* Forget the rows so far. */
void drain_reset(drain_t *drain) { drain->rows = drain->keys.nulls = drain->values.nulls = 0; }

void drain_free(drain_t *drain) {
    if (drain->failed) drain_go_on(drain);
    for (; drain->at < drain->count; drain->at++) drain->client.destroy(drain->consumed[drain->at]);
    void *blocks[] = {drain->topics,       drain->partitions,  drain->leader_epochs, drain->offsets,
                      drain->timestamps,   drain->keys.data,   drain->keys.ends,     drain->keys.valid,
                      drain->values.data,  drain->values.ends, drain->values.valid,  drain};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) free(blocks[i]);
}
