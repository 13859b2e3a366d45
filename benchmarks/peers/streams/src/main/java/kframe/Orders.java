package kframe;

import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.Set;
import java.util.stream.Collectors;
import java.util.stream.IntStream;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.admin.OffsetSpec;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.LagInfo;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.KStream;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.processor.StateRestoreListener;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;

/**
 * Kafka Streams, exactly once. "land" parses every order and writes it to an output topic; "aggregate" keeps
 * count, sum(qty) and sum(qty * price) per sku in a state store with its changelog. The records have no key,
 * so the store adds up each partition's orders for itself: cheaper than sending all of them through a
 * repartition topic first, and enough for whoever adds up the four partitions.
 *
 * <p>"restart" is "aggregate" by one of two instances: the other keeps a standby replica of every store. It is
 * done when everything is committed, by whichever instance, and its stores are whole.
 *
 * <p>Orders JOB BROKERS TOPIC FOLDER APPLICATION
 */
public final class Orders {
    public record Order(
            long order_id, String sku, long qty, double price, long ts, String region, String user) {}

    public record Totals(long n, long qty, double revenue) {
        Totals plus(Order o) {
            return new Totals(n + 1, qty + o.qty(), revenue + o.qty() * o.price());
        }
    }

    private static final ObjectMapper JSON = new ObjectMapper();
    private static final String STORE = "totals";
    private static final Map<String, String> STANDBY = Map.of(
            "num.standby.replicas", "1",
            "session.timeout.ms", "6000",
            "heartbeat.interval.ms", "1000",
            "transaction.timeout.ms", "6000");
    /** Offsets; what ends the changelog is a transaction's marker, which nobody reads. */
    private static final long NEARLY = 10;

    public static void main(String[] args) throws Exception {
        String job = args[0], brokers = args[1], topic = args[2], folder = args[3], application = args[4];
        Properties settings = settings(brokers, folder, application);
        boolean restart = job.equals("restart");
        if (restart) settings.putAll(STANDBY);
        Restoring restoring = new Restoring();
        try (Admin admin = Admin.create(Map.of("bootstrap.servers", brokers));
                KafkaStreams streams = new KafkaStreams(topology(job, topic, application, admin), settings)) {
            streams.setStateListener((now, before) -> {
                if (now == KafkaStreams.State.RUNNING) System.out.println("consuming");
            });
            streams.setUncaughtExceptionHandler(error -> {
                error.printStackTrace();
                Runtime.getRuntime().halt(1);
                return null;
            });
            Map<TopicPartition, Long> ends = ends(admin, topic);
            streams.setGlobalStateRestoreListener(restoring);
            streams.start();
            while (!committed(admin, application).equals(ends) || restart && !whole(streams, ends.size()))
                Thread.sleep(50);
            System.out.println(restart ? "done " + restoring : "done");
            while (System.in.read() >= 0) {}
        }
    }

    private static Properties settings(String brokers, String folder, String application) {
        Properties p = new Properties();
        p.put("bootstrap.servers", brokers);
        p.put("application.id", application);
        p.put("processing.guarantee", "exactly_once_v2");
        p.put("commit.interval.ms", "1000");
        p.put("num.stream.threads", "2");
        p.put("state.dir", folder + "/state");
        p.put("auto.offset.reset", "earliest");
        p.put("max.poll.records", "5000");
        p.put("producer.compression.type", "lz4");
        p.put("producer.batch.size", "262144");
        return p;
    }

    private static Topology topology(String job, String topic, String application, Admin admin) throws Exception {
        StreamsBuilder builder = new StreamsBuilder();
        KStream<byte[], Order> orders =
                builder.stream(topic, Consumed.with(Serdes.ByteArray(), json(Order.class)));
        if (job.equals("land")) {
            String output = application + "-output";
            admin.createTopics(List.of(new NewTopic(output, 4, (short) 1))).all().get();
            orders.to(output, Produced.with(Serdes.ByteArray(), json(Order.class)));
        } else {
            builder.addStateStore(Stores.keyValueStoreBuilder(
                            Stores.persistentKeyValueStore(STORE), Serdes.String(), totals())
                    .withCachingEnabled());
            orders.process(Summing::new, STORE);
        }
        return builder.build();
    }

    private static final class Summing implements Processor<byte[], Order, Void, Void> {
        private static final Totals NOTHING = new Totals(0, 0, 0);
        private KeyValueStore<String, Totals> totals;

        @Override
        public void init(ProcessorContext<Void, Void> context) {
            totals = context.getStateStore(STORE);
        }

        @Override
        public void process(Record<byte[], Order> record) {
            Order order = record.value();
            Totals before = totals.get(order.sku());
            totals.put(order.sku(), (before == null ? NOTHING : before).plus(order));
        }
    }

    /** Rows restored into stores that were then run, and the seconds from the first such restore's start on. */
    private static final class Restoring implements StateRestoreListener {
        private long rows, began, ended;

        @Override
        public synchronized void onRestoreStart(TopicPartition partition, String store, long start, long end) {
            if (began == 0) began = System.nanoTime();
        }

        @Override
        public void onBatchRestored(TopicPartition partition, String store, long end, long restored) {}

        @Override
        public synchronized void onRestoreEnd(TopicPartition partition, String store, long restored) {
            rows += restored;
            ended = System.nanoTime();
        }

        @Override
        public synchronized String toString() {
            return "{\"rows\": " + rows + ", \"restoring_s\": " + (ended - began) / 1e9 + "}";
        }
    }

    /** Whether this instance has every partition's store, active or standing by, up to its changelog's end. */
    private static boolean whole(KafkaStreams streams, int partitions) {
        List<LagInfo> lags = streams.allLocalStorePartitionLags().values().stream()
                .flatMap(stores -> stores.values().stream())
                .toList();
        return lags.size() == partitions && lags.stream().allMatch(lag -> lag.offsetLag() <= NEARLY);
    }

    private static <T> Serde<T> json(Class<T> type) {
        return Serdes.serdeFrom(
                (topic, value) -> {
                    try {
                        return value == null ? null : JSON.writeValueAsBytes(value);
                    } catch (IOException e) {
                        throw new UncheckedIOException(e);
                    }
                },
                (topic, bytes) -> {
                    try {
                        return bytes == null ? null : JSON.readValue(bytes, type);
                    } catch (IOException e) {
                        throw new UncheckedIOException(e);
                    }
                });
    }

    /** 24 bytes: the store serializes a value at every get and put, and JSON would cost more than the sums. */
    private static Serde<Totals> totals() {
        return Serdes.serdeFrom(
                (topic, t) -> t == null
                        ? null
                        : ByteBuffer.allocate(24).putLong(t.n()).putLong(t.qty()).putDouble(t.revenue()).array(),
                (topic, bytes) -> {
                    if (bytes == null) return null;
                    ByteBuffer b = ByteBuffer.wrap(bytes);
                    return new Totals(b.getLong(), b.getLong(), b.getDouble());
                });
    }

    private static Map<TopicPartition, Long> ends(Admin admin, String topic) throws Exception {
        int partitions =
                admin.describeTopics(Set.of(topic)).allTopicNames().get().get(topic).partitions().size();
        Map<TopicPartition, OffsetSpec> latest = IntStream.range(0, partitions)
                .mapToObj(p -> new TopicPartition(topic, p))
                .collect(Collectors.toMap(tp -> tp, tp -> OffsetSpec.latest()));
        return admin.listOffsets(latest).all().get().entrySet().stream()
                .collect(Collectors.toMap(Map.Entry::getKey, e -> e.getValue().offset()));
    }

    private static Map<TopicPartition, Long> committed(Admin admin, String application) throws Exception {
        return admin.listConsumerGroupOffsets(application).partitionsToOffsetAndMetadata().get()
                .entrySet().stream()
                .filter(e -> e.getValue() != null)
                .collect(Collectors.toMap(Map.Entry::getKey, e -> e.getValue().offset()));
    }
}
