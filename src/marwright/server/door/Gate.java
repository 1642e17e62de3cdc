package marwright;

import static io.netty.handler.codec.http.HttpHeaderNames.CONNECTION;
import static io.netty.handler.codec.http.HttpHeaderNames.RETRY_AFTER;

import com.google.gson.JsonObject;
import io.netty.buffer.Unpooled;
import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.*;
import io.netty.util.ReferenceCountUtil;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.ArrayDeque;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import org.pytorch.serve.http.ErrorResponse;
import org.pytorch.serve.util.JsonUtils;

/**
 * Refuses requests before TorchServe sees them; completes, logs and counts the answers of both. It
 * lets in one request of a connection at a time: TorchServe would answer pipelined ones in the order
 * in which its workers are done. But for the number of connections, all state is one connection's
 * and touched by its thread alone.
 */
final class Gate extends ChannelDuplexHandler {
    /** How long a refused client may go on sending: closed at once, it might not see its answer. */
    private static final long LINGER_MILLIS = 1000;

    /** What is counted for a request whose client went before it was answered. */
    private static final int CLIENT_GONE = 499;

    private static final AtomicLong CONNECTIONS = new AtomicLong();

    /** What a client sent on while it waited for an answer. */
    private final ArrayDeque<Object> held = new ArrayDeque<>();

    private ChannelHandlerContext context;
    private Future<?> alarm;
    private boolean counted;
    private boolean full;
    private boolean closing; // the answer that ends the connection was written
    private boolean open; // a request has begun, and is not both received and answered
    private boolean arrived;
    private boolean answered;
    private boolean resends; // a gateway, which may ask another server or worker
    private HttpHeaders admitted; // those of a request with the gateway's token
    private boolean renews; // it is a request for a new token
    private String method;
    private String path;
    private long began;
    private int status;
    private String id;
    private boolean told; // a handler answered, and its own line in the log says why
    private boolean watched; // the connection is one over which predictions are asked for
    private Tally.Target target; // of a prediction that is not answered
    private Tally tally; // of the version that answers it

    @Override
    public void handlerAdded(ChannelHandlerContext ctx) {
        context = ctx;
    }

    @Override
    public void channelActive(ChannelHandlerContext ctx) {
        watched = Tally.watches(ctx.channel());
        counted = CONNECTIONS.incrementAndGet() <= Settings.MAX_CONNECTIONS;
        if (!counted) {
            CONNECTIONS.decrementAndGet();
            full = true;
            later(this::refuseConnection); // where it sends no request that could be answered
        }
        ctx.fireChannelActive();
    }

    @Override
    public void channelInactive(ChannelHandlerContext ctx) {
        if (counted) {
            CONNECTIONS.decrementAndGet();
        }
        closing = true;
        count(CLIENT_GONE);
        stopClock();
        held.forEach(ReferenceCountUtil::release);
        held.clear();
        ctx.fireChannelInactive();
    }

    @Override
    public void channelRead(ChannelHandlerContext ctx, Object message) {
        if (!held.isEmpty() || (open && arrived && !closing)) {
            held.add(message);
            ctx.channel().config().setAutoRead(false);
        } else {
            receive(message);
        }
    }

    private void receive(Object message) {
        if (message instanceof HttpRequest && !closing) {
            begin((HttpRequest) message);
        }
        boolean last = message instanceof LastHttpContent;
        if (last) {
            arrived = true;
            open = !answered;
            stopClock();
        }
        if (!closing) {
            pass(message, last);
            return;
        }
        ReferenceCountUtil.release(message);
        if (last) {
            context.close();
        }
    }

    /** Pass a part of a request on; at the last one TorchServe looks at tokens, and renews them. */
    private void pass(Object message, boolean last) {
        if (last && target != null) {
            tally = Tally.of(target); // TorchServe looks for the version now
        }
        if (last && admitted != null) {
            Gateway.admit(admitted, () -> context.fireChannelRead(message));
        } else if (last && renews) {
            Gateway.renew(() -> context.fireChannelRead(message));
        } else {
            context.fireChannelRead(message);
        }
    }

    private void begin(HttpRequest request) {
        open = true;
        arrived = false;
        answered = false;
        admitted = null;
        renews = false;
        resends = request.headers().contains("x-marwright-gateway");
        began = System.nanoTime();
        method = request.method().name();
        path = request.uri().split("[?#]", 2)[0];
        startClock(); // the first bytes of a pipelined one came with the last ones of another
        String decoded = decode(request);
        String[] parts = decoded.split("/");
        // OPTIONS: a browser asks whether it may ask.
        target = watched && !method.equals("OPTIONS") ? Tally.find(parts) : null;
        tally = null;
        if (full) {
            refuseConnection();
        } else if (!decoded.isEmpty()) {
            check(request, decoded, parts);
        }
    }

    /** Return a request's path; nothing where TorchServe, which decodes alike, says what is wrong. */
    private static String decode(HttpRequest request) {
        try {
            return request.decoderResult().isSuccess()
                    ? new QueryStringDecoder(request.uri()).path() : "";
        } catch (IllegalArgumentException exc) {
            return "";
        }
    }

    private void check(HttpRequest request, String decoded, String[] parts) {
        // TorchServe takes the parts after the first one, whatever that is.
        String routed = decoded.substring(Math.max(0, decoded.indexOf('/')));
        String meant = normalise(parts);
        for (String prefix : Settings.DENY) {
            if (isBelow(routed, prefix) || isBelow(meant, prefix)) {
                refuse(404, "ResourceNotFoundException",
                        "Requested resource is not found, please refer to API document.");
                return;
            }
        }
        if (isBelow(routed, "/models") || isBelow(meant, "/models")) {
            checkManagement(request, parts);
        } else if (Settings.GATEWAY_KEY_FILE != null) {
            admitted = Gateway.sent(request.headers()) ? request.headers() : null;
            renews = isBelow(routed, "/token");
        }
    }

    private void checkManagement(HttpRequest request, String[] parts) {
        String verb = request.method().name();
        boolean reads = verb.equals("GET") || verb.equals("HEAD") || verb.equals("OPTIONS");
        // POST /models/NAME/invoke is a prediction, and on the management address nothing.
        boolean invokes = verb.equals("POST") && parts.length == 4 && parts[3].equals("invoke");
        if (Settings.KEY_FILE != null && !reads && !invokes) {
            byte[] key = request.headers().get("X-Marwright-Key", "").getBytes(StandardCharsets.UTF_8);
            if (key.length == 0 || !MessageDigest.isEqual(key, Settings.Key.VALUE)) {
                refuse(405, "MethodNotAllowedException",
                        "This server's models are what its deployment says: change that, or use the"
                                + " marwright command, which sends the key (X-Marwright-Key). In"
                                + " deploy.yaml, access.models: token lets whoever has the"
                                + " management token change them.");
                return;
            }
        }
        request.headers().remove("X-Marwright-Key");
        // TorchServe takes a request for one for tokens wherever "/token" stands in it.
        request.setUri(request.uri().replace("/token", "/%74oken"));
        for (Map.Entry<String, String> header : request.headers().entries()) {
            if (header.getValue().contains("/token")) {
                request.headers().remove(header.getKey());
            }
        }
    }

    /** Return the path without empty, "." and ".." parts. */
    private static String normalise(String[] parts) {
        ArrayDeque<String> kept = new ArrayDeque<>();
        for (String part : parts) {
            if (part.equals("..")) {
                kept.pollLast();
            } else if (!part.isEmpty() && !part.equals(".")) {
                kept.addLast(part);
            }
        }
        return "/" + String.join("/", kept);
    }

    private static boolean isBelow(String path, String prefix) {
        return path.startsWith(prefix)
                && (path.length() == prefix.length() || path.charAt(prefix.length()) == '/');
    }

    /** Begin to wait for a request's last byte, unless that wait has begun. */
    void startClock() {
        if (alarm == null && !closing && Settings.REQUEST_MILLIS > 0) {
            alarm = context.executor()
                    .schedule(this::expire, Settings.REQUEST_MILLIS, TimeUnit.MILLISECONDS);
        }
    }

    private void stopClock() {
        if (alarm != null) {
            alarm.cancel(false);
            alarm = null;
        }
    }

    private void expire() {
        alarm = null;
        if (open && arrived) {
            startClock(); // the request before it is being answered
        } else if (closing || (open && answered)) {
            context.close();
        } else {
            refuse(408, "RequestTimeoutException", "The request did not arrive whole within "
                    + Settings.REQUEST_MILLIS / 1000.0 + " s.");
        }
    }

    private void refuseConnection() {
        if (!closing) {
            refuse(503, "ServiceUnavailableException", "The server has no room for a connection.");
        }
    }

    /** Answer in the form of TorchServe's own errors; close once the request is received. */
    private void refuse(int code, String type, String text) {
        String body = JsonUtils.GSON_PRETTY.toJson(new ErrorResponse(code, type, text)) + "\n";
        FullHttpResponse answer = new DefaultFullHttpResponse(
                HttpVersion.HTTP_1_1, HttpResponseStatus.valueOf(code),
                Unpooled.copiedBuffer(body, StandardCharsets.UTF_8));
        answer.headers().set("content-type", "application/json");
        answer.headers().set("content-length", answer.content().readableBytes());
        answer.headers().set("x-request-id", UUID.randomUUID().toString());
        answer.headers().set(CONNECTION, "close");
        write(context, answer, context.newPromise());
        context.flush();
        later(context::close);
    }

    private void later(Runnable action) {
        context.executor().schedule(action, LINGER_MILLIS, TimeUnit.MILLISECONDS);
    }

    @Override
    public void write(ChannelHandlerContext ctx, Object message, ChannelPromise promise) {
        boolean last = message instanceof LastHttpContent;
        if (message instanceof HttpResponse) {
            HttpResponse response = (HttpResponse) message;
            if (response.status().codeClass() == HttpStatusClass.INFORMATIONAL) {
                last = false; // 100 Continue is no answer
            } else {
                complete(response);
            }
        }
        ctx.write(message, promise);
        if (last) {
            logAnswer();
            count(status);
            answered = true;
            open = open && !arrived;
            if (!held.isEmpty()) {
                ctx.executor().execute(this::release); // once this answer is flushed
            }
        }
    }

    private void complete(HttpResponse response) {
        HttpHeaders headers = response.headers();
        status = response.status().code();
        id = headers.get("x-request-id", "");
        told = headers.get("content-type", "").startsWith("application/problem+json");
        closing |= headers.contains(CONNECTION, "close", true);
        if (resends && !told && (status == 500 || status == 507)) {
            // A worker that was ended held it. nginx sends a 503 to another one, but no 507.
            response.setStatus(HttpResponseStatus.SERVICE_UNAVAILABLE);
            status = 503;
        }
        if ((status == 429 || status == 503) && !headers.contains(RETRY_AFTER)) {
            headers.set(RETRY_AFTER, Settings.RETRY_AFTER);
        }
    }

    private void release() {
        while (!held.isEmpty() && (closing || !(open && arrived))) {
            receive(held.poll());
        }
        if (held.isEmpty()) {
            if (open && !arrived) {
                stopClock(); // until now it was not allowed to arrive
                startClock();
            }
            context.channel().config().setAutoRead(true);
        }
    }

    private void count(int code) {
        if (target != null) {
            // One that did not arrive whole is counted for the version that would have answered.
            Tally counted = tally == null ? Tally.of(target) : tally;
            counted.count(code, System.nanoTime() - began);
            target = null;
        }
    }

    private void logAnswer() {
        boolean failed = status >= 400;
        boolean wanted = Settings.LOG_REQUESTS.equals("all")
                || Settings.LOG_REQUESTS.equals("errors") && failed && !told;
        if (!wanted) {
            return;
        }
        JsonObject line = new JsonObject();
        if (open) { // a request whose head has not arrived has neither method nor path
            line.addProperty("method", method.substring(0, Math.min(method.length(), 32)));
            line.addProperty("path", path.substring(0, Math.min(path.length(), 256)));
            line.addProperty("milliseconds", (System.nanoTime() - began) / 1_000_000);
        }
        line.addProperty("status", status);
        line.addProperty("request_id", id);
        if (failed) {
            Settings.LOG.warn(line.toString());
        } else {
            Settings.LOG.info(line.toString());
        }
    }
}
