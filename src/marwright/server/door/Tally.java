package marwright;

import io.netty.channel.Channel;
import io.prometheus.client.Collector;
import io.prometheus.client.CollectorRegistry;
import io.prometheus.client.Counter;
import io.prometheus.client.Histogram;
import java.net.InetSocketAddress;
import java.net.SocketAddress;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.ConnectorType;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.ModelVersionName;

/**
 * Counts the predictions and explanations of one version, in the registry that TorchServe shows at
 * its metrics address. A version's series stay when it is unregistered: it may come back.
 */
final class Tally {
    /** What a request asks for; the version is null where it names none. */
    record Target(String model, String version) {
        private static final Target NOTHING = new Target("", null);
    }

    private static final int LEAST_STATUS = 100;
    private static final int STATUSES = 500;
    /** What else a handler may set, all together: it shall not make up series. */
    private static final String OTHER = "other";

    private static final double NANOS = 1e9;

    private static final Counter REQUESTS = register(Counter.build()
            .name("marwright_http_requests_total")
            .help("Predictions and explanations over HTTP, by the status of their answers.")
            .labelNames("model", "version", "status")
            .create());
    private static final Histogram SECONDS = register(Histogram.build()
            .name("marwright_http_request_seconds")
            .help("From a request's head to the last byte of its answer.")
            .labelNames("model", "version")
            .buckets(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
            .create());

    private static final SocketAddress INFERENCE = ConfigManager.getInstance()
            .getListener(ConnectorType.INFERENCE_CONNECTOR).getSocketAddress();

    private static final ModelVersionName UNKNOWN = new ModelVersionName("", "");
    private static final Map<ModelVersionName, Tally> TALLIES = new ConcurrentHashMap<>();

    private final ModelVersionName name;
    private final Histogram.Child seconds;
    /** By status, made when first needed; two threads that do so at once make the same. */
    private final Counter.Child[] requests = new Counter.Child[STATUSES];

    private Tally(ModelVersionName name) {
        this.name = name;
        seconds = SECONDS.labels(name.getModelName(), name.getVersion());
    }

    /** Return whether a connection was made to the inference address, where predictions are. */
    static boolean watches(Channel channel) {
        SocketAddress local = channel.localAddress();
        if (local instanceof InetSocketAddress && INFERENCE instanceof InetSocketAddress) {
            return ((InetSocketAddress) local).getPort()
                    == ((InetSocketAddress) INFERENCE).getPort();
        }
        return true; // a socket file's connections do not say whose they are
    }

    /** Return what a path's parts ask for, as TorchServe routes them; null for no prediction. */
    static Target find(String[] parts) {
        int length = parts.length;
        if (length < 2) {
            return null;
        }
        switch (parts[1]) {
            case "predictions":
            case "explanations":
                return length < 3 ? Target.NOTHING
                        : new Target(parts[2], length < 4 ? null : parts[3]);
            case "invocations":
                return Target.NOTHING; // whose model the body may say
            case "models":
                return length == 4 && parts[3].equals("invoke") ? new Target(parts[2], null) : null;
            default:
                return findOther(parts);
        }
    }

    private static Target findOther(String[] parts) {
        int length = parts.length;
        String last = parts[length - 1];
        if (last.equals("predict") && (length == 3 || length == 4)) {
            return new Target(parts[1], length == 3 ? null : parts[2]);
        }
        if (length < 4 || !parts[2].equals("models")) {
            return null;
        }
        if (parts[1].equals("v1") && length == 4) {
            boolean asks = last.contains(":predict") || last.contains(":explain");
            return asks ? new Target(last.substring(0, last.indexOf(':')), null) : null;
        }
        if (parts[1].equals("v2") && (last.equals("infer") || last.equals("explain"))) {
            if (length == 5) {
                return new Target(parts[3].split(":", 2)[0], null);
            }
            if (length == 7 && parts[4].equals("versions")) {
                return new Target(parts[3], parts[5]);
            }
        }
        return null;
    }

    /** Return the tally of the version that answers a request now; never fails. */
    static Tally of(Target target) {
        ModelVersionName name = UNKNOWN;
        try {
            Model model = ModelManager.getInstance().getModel(target.model, target.version);
            if (model != null) {
                name = model.getModelVersionName();
            }
        } catch (ModelVersionNotFoundException exc) {
            // as of a model that is not known
        }
        return TALLIES.computeIfAbsent(name, Tally::new);
    }

    /** Count one request. */
    void count(int status, long nanos) {
        int index = status - LEAST_STATUS;
        if (index >= 0 && index < STATUSES) {
            Counter.Child child = requests[index];
            if (child == null) {
                child = label(Integer.toString(status));
                requests[index] = child;
            }
            child.inc();
        } else {
            label(OTHER).inc();
        }
        seconds.observe(nanos / NANOS);
    }

    private Counter.Child label(String status) {
        return REQUESTS.labels(name.getModelName(), name.getVersion(), status);
    }

    /** Show a metric, unless another has its name. */
    private static <C extends Collector> C register(C metric) {
        try {
            CollectorRegistry.defaultRegistry.register(metric);
        } catch (IllegalArgumentException exc) {
            Settings.LOG.error("requests are not counted: {}", exc.toString());
        }
        return metric;
    }
}
