/* The C limit: librdkafka's own consumer, on all partitions from the start, doing nothing with the records
   ("read") or copying each value into a buffer of 64 MB, round and round ("copy").

   limit BROKERS TOPIC PARTITIONS RECORDS read|copy
   Prints "consuming", then "done COUNT BYTES", and ends when its input is closed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "librdkafka.h"

enum { BATCH = 10000, BUFFER = 64 << 20 };

static rd_kafka_t *consumer(const char *brokers) {
        const char *settings[][2] = {
            {"bootstrap.servers", brokers},        {"group.id", "limit"},
            {"enable.auto.commit", "false"},       {"isolation.level", "read_committed"},
            {"fetch.queue.backoff.ms", "5"},       {"queued.min.messages", "300000"},
            {"queued.max.messages.kbytes", "131072"}, {"check.crcs", "true"},
        };
        char error[512];
        rd_kafka_conf_t *conf = rd_kafka_conf_new();
        for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
                if (rd_kafka_conf_set(conf, settings[i][0], settings[i][1], error, sizeof error) !=
                    RD_KAFKA_CONF_OK) {
                        fprintf(stderr, "%s\n", error);
                        exit(1);
                }
        rd_kafka_t *kafka = rd_kafka_new(RD_KAFKA_CONSUMER, conf, error, sizeof error);
        if (!kafka) {
                fprintf(stderr, "%s\n", error);
                exit(1);
        }
        rd_kafka_poll_set_consumer(kafka);
        return kafka;
}

static void assign(rd_kafka_t *kafka, const char *topic, int partitions) {
        rd_kafka_topic_partition_list_t *list = rd_kafka_topic_partition_list_new(partitions);
        for (int p = 0; p < partitions; p++) {
                rd_kafka_topic_partition_list_add(list, topic, p);
                rd_kafka_topic_partition_list_set_offset(list, topic, p, 0);
        }
        rd_kafka_assign(kafka, list);
}

int main(int argc, char **argv) {
        if (argc != 6) {
                fprintf(stderr, "limit BROKERS TOPIC PARTITIONS RECORDS read|copy\n");
                return 2;
        }
        const long wanted = atol(argv[4]);
        const int copy = strcmp(argv[5], "copy") == 0;
        static rd_kafka_message_t *records[BATCH];
        char *buffer = copy ? malloc(BUFFER) : NULL;
        long count = 0, bytes = 0;
        size_t used = 0;

        rd_kafka_t *kafka = consumer(argv[1]);
        printf("consuming\n");
        fflush(stdout);
        assign(kafka, argv[2], atoi(argv[3]));
        rd_kafka_queue_t *queue = rd_kafka_queue_get_consumer(kafka);
        while (count < wanted) {
                ssize_t n = rd_kafka_consume_batch_queue(queue, 100, records, BATCH);
                for (ssize_t i = 0; i < n; i++) {
                        rd_kafka_message_t *r = records[i];
                        if (!r->err) {
                                count++;
                                bytes += r->len;
                                if (copy) {
                                        if (used + r->len > BUFFER)
                                                used = 0;
                                        memcpy(buffer + used, r->payload, r->len);
                                        used += r->len;
                                }
                        }
                        rd_kafka_message_destroy(r);
                }
        }
        printf("done %ld %ld\n", count, bytes);
        fflush(stdout);
        getchar();
        return 0;
}
